#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <system_error>

#include "bindings.h"
#include "disk.h"

namespace embpack {
namespace {

using RowNumbers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using RowBytesOut = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using RowBytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// A file that any number of arrays are read from.
struct FileView {
    std::shared_ptr<const DiskFile> file;

    explicit FileView(int descriptor) {
        try {
            file = std::make_shared<DiskFile>(descriptor);
        } catch (const std::system_error& error) {
            errno = error.code().value();
            PyErr_SetFromErrno(PyExc_OSError);
            throw nb::python_error();
        }
    }
};

// An array of a file, or of several.
struct RowsView {
    DiskRows array;
    size_t num_rows = 0;

    RowsView(const nb::list& pieces, size_t row_bytes) : array{{}, row_bytes} {
        for (nb::handle piece : pieces) {
            const auto [file, offset, rows] = nb::cast<std::tuple<const FileView*, uint64_t, size_t>>(piece);
            array.pieces.push_back({file->file, offset, num_rows, rows});
            num_rows += rows;
        }
    }
};

// Each row is to be there but once where `step` is 1.
void check_ascending(const RowNumbers& rows, size_t num_rows, int64_t step) {
    int64_t least = 0;
    for (size_t i = 0; i < rows.shape(0); i++) {
        const int64_t row = rows.data()[i];
        require(row >= least, step == 1 ? "rows must ascend, each once" : "rows must ascend");
        require(static_cast<size_t>(row) < num_rows, "there are no such rows");
        least = row + step;
    }
}

std::optional<std::tuple<size_t, size_t, uint64_t, int>> read_arrays(const nb::list& reads) {
    std::vector<DiskRead> cut;
    for (nb::handle read : reads) {
        const auto [view, rows, out] = nb::cast<std::tuple<const RowsView*, RowNumbers, RowBytesOut>>(read, false);
        check_ascending(rows, view->num_rows, 1);
        require(out.shape(0) == rows.shape(0) && out.shape(1) == view->array.row_bytes, "out has the wrong shape");
        cut.push_back({view->array, {rows.data(), rows.shape(0)}, out.data()});
    }
    std::optional<DiskFault> fault;
    {
        const WithoutPython without;
        fault = read_rows(cut);
    }
    if (!fault) return std::nullopt;
    return std::tuple{fault->read, fault->piece, fault->offset, fault->error};
}

int write_array(int descriptor, uint64_t offset, size_t num_rows, const RowNumbers& rows, const RowBytes& bytes) {
    check_ascending(rows, num_rows, 1);
    require(bytes.shape(0) == rows.shape(0), "there must be as many rows as numbers");
    const WithoutPython without;
    return write_file_rows(descriptor, offset, bytes.shape(1), {rows.data(), rows.shape(0)}, bytes.data());
}

void prefetch(const RowsView& view, const RowNumbers& rows) {
    check_ascending(rows, view.num_rows, 0);
    const WithoutPython without;
    prefetch_rows(view.array, {rows.data(), rows.shape(0)});
}

void prefetch_mapped(const RowBytes& packed, const RowNumbers& rows) {
    check_ascending(rows, packed.shape(0), 0);
    const WithoutPython without;
    prefetch_mapped_rows(packed.data(), packed.shape(1), {rows.data(), rows.shape(0)});
}

}  // namespace

void bind_disk(nb::module_& m) {
    nb::class_<FileView>(m, "DiskFile", "An open file, of whose descriptor this has a duplicate.")
        .def(nb::init<int>(), nb::arg("descriptor"));
    nb::class_<RowsView>(m, "DiskRows", "Rows of an array on the disk.")
        .def(nb::init<const nb::list&, size_t>(), nb::arg("pieces"), nb::arg("row_bytes"),
             nb::sig("def __init__(self, pieces: list[tuple[DiskFile, int, int]], row_bytes: int) -> None"),
             "Make them of pieces, one after the other: file, offset, number of rows.");
    m.def("read_rows", &read_arrays, nb::arg("reads"),
          nb::sig("def read_rows(reads: list[tuple[DiskRows, numpy.typing.NDArray[numpy.int64], "
                  "numpy.typing.NDArray[numpy.uint8]]]) -> tuple[int, int, int, int] | None"),
          "Read rows, ascending and each once, of arrays, each into its `out`. Returns of what could not be read the "
          "number of the read, that of the piece, the offset of the row and errno, 0 where the file ends before; or None.");
    m.def("write_file_rows", &write_array, nb::arg("descriptor"), nb::arg("offset"), nb::arg("num_rows"), nb::arg("rows"),
          nb::arg("bytes").noconvert(),
          nb::sig("def write_file_rows(descriptor: int, offset: int, num_rows: int, rows: numpy.typing.NDArray[numpy.int64], "
                  "bytes: numpy.typing.NDArray[numpy.uint8]) -> int"),
          "Write rows, ascending and each once, of an array of num_rows that lies in an open file from an offset on; "
          "returns errno, 0 if all are written.");
    m.def("prefetch_rows", &prefetch, nb::arg("array"), nb::arg("rows"),
          nb::sig("def prefetch_rows(array: DiskRows, rows: numpy.typing.NDArray[numpy.int64]) -> None"),
          "Have rows, ascending, read into the system's cache of pages, and return at once.");
    m.def("prefetch_mapped_rows", &prefetch_mapped, nb::arg("packed").noconvert(), nb::arg("rows"),
          nb::sig("def prefetch_mapped_rows(packed: numpy.typing.NDArray[numpy.uint8], "
                  "rows: numpy.typing.NDArray[numpy.int64]) -> None"),
          "Do the same for rows of a mapped file.");
}

}  // namespace embpack
