"""Our exceptions: they go from process to process as they are."""

import pickle
import re
from pathlib import Path

import pytest

import embpack
from embpack.composites import _UnreadableError
from embpack.errors import EngineError, FormatError, LossLimitError, MissingExtraError
from embpack.formats.pickled import PickleError
from embpack.formats.remote import RemoteError
from embpack.ranges import DamagedPartError
from embpack.ray import _LostArgumentError

ERRORS = [
    DamagedPartError("part 3: is not what was written", "00003"),
    EngineError("127.0.0.1:6379: there is no Ray cluster"),
    FormatError("model.npy: is\ndamaged"),
    LossLimitError("2 tables lose more", 0.5, {"user_emb": 0.75, "item_emb": 0.625}),
    MissingExtraError("embpack.ray", "Ray", "ray"),
    PickleError("runs code"),
    RemoteError("s3://bucket/model: access is denied"),
    _LostArgumentError("a task could not be run"),
    _UnreadableError("no scales"),
]


def test_every_exception_is_listed_here():
    sources = [path.read_text() for path in Path(embpack.__file__).parent.rglob("*.py")]
    found = {
        name for source in sources for name in re.findall(r"^class (\w+(?:Error|Exception|Warning))\(", source, re.M)
    }
    assert found == {type(error).__name__ for error in ERRORS}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_exceptions_go_from_process_to_process(error):
    error.add_note("of rows 5 to 9")
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is type(error)
    assert str(other) == str(error)
    assert vars(other) == vars(error)
    assert other.__notes__ == ["of rows 5 to 9"]
