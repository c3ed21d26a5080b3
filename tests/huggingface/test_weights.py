"""A damaged or hostile weight file is refused before its data is read."""

import contextlib
import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from dpo.huggingface.weights import SafetensorsDirectory, read_safetensors_header

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path, header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_tensors_are_read_as_written(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "model.safetensors")
    directory = SafetensorsDirectory(tmp_path)
    assert directory.shapes == {"a": (2, 3), "b": (4,)}
    for name, expected in TENSORS.items():
        assert_array_equal(directory.read(name), expected)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"a": 1, "a": 2}', "duplicate names"),
        ({"a": {**ENTRY, "data_offsets": [0, 80]}}, "tensor a is"),
        ({"a": {**ENTRY, "data_offsets": [-8, 0]}}, "tensor a is"),
        ({"a": {**ENTRY, "shape": [3]}}, "tensor a is"),
        ({"a": {**ENTRY, "shape": [True, 2]}}, "tensor a is"),
        ({"a": {**ENTRY, "shape": "2"}}, "tensor a is"),
        ({"a": {**ENTRY, "shape": [1] * 9, "data_offsets": [0, 4]}}, "at most 8 axes"),
        ({"a": {**ENTRY, "dtype": "F33"}}, "allowed is a dtype of the format"),
        ({"a": {**ENTRY, "dtype": "I16"}}, "tensor a is"),
        ({"a": {**ENTRY, "shape": [0, 2**60], "data_offsets": [0, 0]}}, "tensor a is"),
        ({"__metadata__": {"format": 1}, "a": ENTRY}, "__metadata__ must map names to texts"),
        ("é".encode("latin1") * 4, "not valid JSON"),
        ({"a": ENTRY, "b": ENTRY}, "overlaps"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "leaves a gap"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "4 bytes after the last tensor"),
    ],
)
def test_an_inconsistent_header_is_refused(tmp_path, header, message):
    with pytest.raises(ValueError, match=message):
        read_safetensors_header(write(tmp_path / "x.safetensors", header))


def test_a_huge_or_truncated_header_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "x.safetensors"
    for content in (b"", b"\1\2", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 100) + b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="header of"):
            read_safetensors_header(path)


def test_a_directory_by_the_name_of_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match="must be a regular file, and is a directory"):
        SafetensorsDirectory(tmp_path)


def test_a_file_that_is_cut_after_its_header_was_read_is_noticed(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "model.safetensors")
    directory = SafetensorsDirectory(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(8)
    with pytest.raises(ValueError, match="tensor a ends after 0 of 6 elements"):
        directory.read("a")


def test_rows_are_read_as_slices(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "model.safetensors")
    directory = SafetensorsDirectory(tmp_path)
    assert_array_equal(directory.read("a", slice(1, 2)), TENSORS["a"][1:2])
    assert_array_equal(directory.read("b", slice(1, 3)), TENSORS["b"][1:3])
    assert directory.read("a", slice(2, 2)).shape == (0, 3)


def test_a_dtype_that_is_no_float_is_refused_when_read(tmp_path):
    write(tmp_path / "model.safetensors", {"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}})
    with pytest.raises(ValueError, match="tensor a has dtype I64; supported: F64, F32, F16, BF16"):
        SafetensorsDirectory(tmp_path).read("a")


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", ".."])
def test_an_index_reaches_only_files_beside_it(tmp_path, file):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ValueError, match=r"allowed are \.safetensors files beside the index"):
        SafetensorsDirectory(tmp_path)


def test_an_index_says_exactly_what_its_files_hold(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m.safetensors", "c": "m.safetensors"}}))
    with pytest.raises(ValueError, match=r"m.safetensors is missing"):
        SafetensorsDirectory(tmp_path)
    safetensors.numpy.save_file(TENSORS, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"missing \['c'\], left over \['b'\]"):
        SafetensorsDirectory(tmp_path)


def test_several_files_need_an_index(tmp_path):
    for name in ("x", "y"):
        safetensors.numpy.save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"2 safetensors files .* and no model.safetensors.index.json"):
        SafetensorsDirectory(tmp_path)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"pickled \(pytorch_model.bin\).*save_pretrained"):
        SafetensorsDirectory(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=st.integers(0, 200), flips=st.lists(st.tuples(st.integers(0, 160), st.integers(0, 255)), max_size=4)
)
def test_damage_is_an_error_or_harmless(tmp_path, cut, flips):
    """Any truncation and any changed bytes: a `ValueError`, or tensors that lie inside the file."""
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    for position, byte in flips:
        content[position % len(content)] = byte
    path.write_bytes(content[: max(len(content) - cut, 0)])
    with contextlib.suppress(ValueError):
        directory = SafetensorsDirectory(tmp_path)
        for name in directory.shapes:
            assert directory.read(name).shape == directory.shapes[name]


numbers = st.one_of(
    st.integers(0, 24), st.integers(-4, 2**70), st.booleans(), st.floats(), st.none(), st.text(max_size=2)
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F33", "", 4]),
        "shape": st.lists(numbers, max_size=3) | numbers,
        "data_offsets": st.lists(numbers, max_size=3),
    }
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | numbers, max_size=3),
    data=st.binary(max_size=24),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_any_header_is_an_error_or_describes_the_file(tmp_path, header, data, length):
    """Types, shapes, offsets and lengths of all sorts: a `ValueError`, or tensors that cover the data."""
    path = tmp_path / "model.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    with contextlib.suppress(ValueError):
        directory = SafetensorsDirectory(tmp_path)
        sizes = [directory.read(name).nbytes for name in directory.shapes]
        assert sum(sizes) == len(data)


paths = st.sampled_from(
    [
        "m.safetensors",
        "../secret.safetensors",
        "/etc/passwd",
        "sub/m.safetensors",
        "..",
        "",
        ".",
        "\0",
        "m.bin",
    ]
) | st.text(max_size=8).map(lambda name: f"{name}.safetensors")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weight_map=st.dictionaries(st.sampled_from(["a", "b", "c"]), paths | numbers, max_size=3) | numbers)
def test_no_index_reads_outside_its_directory(tmp_path, weight_map):
    inside = tmp_path / "model"
    inside.mkdir(exist_ok=True)
    safetensors.numpy.save_file(TENSORS, inside / "m.safetensors")
    safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, tmp_path / "secret.safetensors")
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with contextlib.suppress(ValueError):
        directory = SafetensorsDirectory(inside)
        assert directory.shapes in ({}, {"a": (2, 3), "b": (4,)})
