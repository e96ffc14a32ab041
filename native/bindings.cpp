#include "bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "dispatch.h"
#include "threads.h"

namespace embpack {
namespace {

std::vector<std::string> list_isas() {
    std::vector<std::string> names;
    for (std::string_view name : available_isas()) names.emplace_back(name);
    return names;
}

// Lets Python handle the signals that came while a loop ran: Ctrl-C raises KeyboardInterrupt in its main thread.
void handle_signals() {
    if (!Py_IsInitialized()) return;   // a thread that is left when the interpreter ends
    const WithPython python;
    outlive_python([] {
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
    });
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "The native core of embpack. Private: use the functions of the package.";
    // PyTorch keeps what is registered with it, and with that our caches, beyond the end of the interpreter.
    nb::set_leak_warnings(false);
    set_interruption(&handle_signals);
    bind_quantize(m);
    bind_clusters(m);
    bind_lookup(m);
    bind_tensors(m);
    bind_operators(m);
    bind_disk(m);

    m.def("isa", [] { return std::string(kernels().isa); }, "Name of the instruction set in use.");
    m.def("available_isas", &list_isas, "Names of the instruction sets that this CPU runs, best first.");
    m.def("use_isa", [](const std::string& name) { return use_isa(name); }, nb::arg("name"),
          "Switch to an instruction set; False if this CPU lacks it.");
    m.def("num_threads", &num_threads, "Threads in use.");
    m.def("set_num_threads", [](int count) {
        require(count > 0, "count must be positive");
        set_num_threads(count);
    }, nb::arg("count"), "Use this many threads.");
}

}  // namespace embpack
