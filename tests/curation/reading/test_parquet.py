"""Parquet files of every make: the column with the images is found, every row is a row, damage costs its row group."""

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.reading.listing import choose_column, find_parts
from curation.reading.sources import MemberReader, read_samples
from curation.run import main
from tests.conftest import encoded, picture, picture_tar

LIMIT = 1 << 20
IMAGES = [encoded(picture(i), format_) for i, format_ in enumerate(["JPEG", "PNG", "WEBP", "JPEG", "GIF"])]
SAME_SIZE = [image.ljust(max(map(len, IMAGES)), b"\0") for image in IMAGES]
NOISE = [bytes([255 - i]) * 16 for i in range(5)]


def write(path, columns, **options):
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)
    return path


def read(path, limit=LIMIT, column=None):
    """Samples of one file; every image and every other member is read back, in order and then backwards."""
    listing = find_parts([str(path)])
    part = (choose_column([listing], column)[0] if column else listing)[0]
    samples = list(read_samples(part, limit))
    if not any(sample.content for sample in samples):
        return samples
    with MemberReader(part.kind, part.url) as reader:
        for sample in [*samples, *samples[::-1]]:
            if sample.content is not None:
                assert reader.read(sample.image) == sample.content
            for member in sample.others:
                assert len(reader.read(member)) == member.size
    return samples


def structs(images):
    return [{"bytes": image, "path": f"n.{i}.jpg"} for i, image in enumerate(images)]


def text(image, wrap=False):
    return (base64.encodebytes if wrap else base64.b64encode)(image).decode()


KINDS = {
    "binary": lambda: pa.array(IMAGES),
    "large_binary": lambda: pa.array(IMAGES, pa.large_binary()),
    "binary_view": lambda: pa.array(IMAGES, pa.binary_view()),
    "fixed_size_binary": lambda: pa.array(SAME_SIZE, pa.binary(len(SAME_SIZE[0]))),
    "dictionary": lambda: pa.array(IMAGES).dictionary_encode(),
    "base64": lambda: pa.array([text(image) for image in IMAGES]),
    "base64_lines": lambda: pa.array([text(image, wrap=True) for image in IMAGES]),
    "base64_url": lambda: pa.array([base64.urlsafe_b64encode(image).decode().rstrip("=") for image in IMAGES]),
    "base64_large_string": lambda: pa.array([text(image) for image in IMAGES], pa.large_string()),
    "base64_dictionary": lambda: pa.array([text(image) for image in IMAGES]).dictionary_encode(),
    "base64_bytes": lambda: pa.array([text(image).encode() for image in IMAGES]),
    "data_url": lambda: pa.array([f"data:image/png;base64,{text(image)}" for image in IMAGES]),
    "struct": lambda: pa.array(structs(IMAGES)),
    "struct_of_base64": lambda: pa.array([{"bytes": text(image)} for image in IMAGES]),
    "list_of_binary": lambda: pa.array([[image] for image in IMAGES]),
    "list_of_structs": lambda: pa.array([[s] for s in structs(IMAGES)]),
    "large_list": lambda: pa.array([[image] for image in IMAGES], pa.large_list(pa.binary())),
    "nested": lambda: pa.array([{"a": {"b": image, "c": "x"}, "n": 1} for image in IMAGES]),
    "nested_struct": lambda: pa.array([{"photo": s, "n": 1} for s in structs(IMAGES)]),
    "list_of_nested": lambda: pa.array([[{"photo": s}, {"photo": None}] for s in structs(IMAGES)]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["image", "whatever", "url"])
def test_images_of_every_make_are_read(tmp_path, kind, name):
    columns = {"n": range(5), name: KINDS[kind](), "caption": [f"text {i}" for i in range(5)]}
    samples = read(write(tmp_path / "a.parquet", columns, row_group_size=2))
    expected = SAME_SIZE if kind == "fixed_size_binary" else IMAGES
    assert [sample.content for sample in samples] == expected
    assert [sample.reason for sample in samples] == [None] * 5
    assert json.loads(samples[3].metadata) == {"n": 3, "caption": "text 3"}
    assert [member.suffix for member in samples[3].others] == ["json", "txt"]
    assert [sample.image and sample.image.size for sample in samples] == [len(image) for image in expected]
    assert len({sample.key for sample in samples}) == 5
    assert all(len(sample.key) < 20 for sample in samples)


@pytest.mark.parametrize(
    "decoy",
    [
        {"phash": NOISE},
        {"image": NOISE},
        {"audio": structs(NOISE)},
        {"image": [None] * 5},
        {"bytes": pa.array([None] * 5, pa.binary())},
        {"embedding": [b"\0" * 4096] * 5},
        {"jpg": ["a caption", "not base64!", "words", "", "x"]},
        {"jpg": structs([None] * 5)},
        {"meta": [{"image": b"0123456789", "n": 1}] * 5},
        {"thumbnail": [IMAGES[0], b"no", b"no", b"no", b"no"]},
    ],
    ids=lambda decoy: next(iter(decoy)),
)
@pytest.mark.parametrize("kind", ["binary", "struct", "base64"])
def test_values_tell_the_column_and_not_names(tmp_path, decoy, kind):
    samples = read(write(tmp_path / "a.parquet", {**decoy, "Picture": KINDS[kind]()}))
    assert [sample.content for sample in samples] == IMAGES


def test_of_two_columns_of_images_the_known_name_is_taken(tmp_path):
    others = IMAGES[::-1]
    for name, expected in (("image", IMAGES), ("IMAGE", IMAGES), ("jpg", IMAGES), ("thumb", others)):
        samples = read(write(tmp_path / f"{name}.parquet", {"first": others, name: IMAGES}))
        assert [sample.content for sample in samples] == expected


@pytest.mark.parametrize("column", ["mask", "pair.left", "pair.right", "dotted.name", "deep.of"])
def test_a_column_can_be_said(tmp_path, column):
    right = IMAGES[::-1]
    columns = {
        "image": [b"\xff\xd8\xff other"] * 5,
        "mask": right,
        "pair": [{"left": image, "right": image} for image in right],
        "dotted.name": right,
        "deep": [[{"of": s} for s in structs([image])] for image in right],
    }
    path = write(tmp_path / "a.parquet", columns)
    assert [sample.content for sample in read(path, column=column)] == right
    before, after = find_parts([str(path)]), choose_column([find_parts([str(path)])], column)[0]
    assert before[0].id != after[0].id


@pytest.mark.parametrize("column", ["picture", "image.nothing", "Mask"])
def test_an_unknown_column_lists_the_columns(tmp_path, capsys, column):
    write(tmp_path / "a.parquet", {"image": structs(IMAGES), "mask": IMAGES})
    tar = picture_tar(tmp_path / "s.tar", range(2))
    command = ["--pool", f"{tmp_path}/a.parquet", "--seed", str(tar), "--config", "offline", "--dry-run"]
    assert main([*command, "--out", f"{tmp_path}/run", "--image-column", column]) == 1
    error = capsys.readouterr().err
    assert f"'{column}'" in error
    assert "image, image.bytes, image.path, mask" in error
    assert main([*command, "--out", f"{tmp_path}/run", "--image-column", "mask"]) == 0


def test_a_column_goes_to_the_files_that_have_it(tmp_path):
    write(tmp_path / "a.parquet", {"image": IMAGES, "mask": IMAGES[::-1]})
    write(tmp_path / "b.parquet", {"image": IMAGES})
    chosen = choose_column([find_parts([str(tmp_path)]), find_parts([f"{tmp_path}/b.parquet"])], "mask")
    assert [[part.column for part in listing] for listing in chosen] == [["mask", ""], [""]]
    with pytest.raises(ValueError, match="is for Parquet files"):
        choose_column([find_parts([str(picture_tar(tmp_path / "s.tar", range(1)))])], "mask")


@pytest.mark.parametrize(
    ("values", "reasons"),
    [
        ([None], ["no_image"]),
        ([{"bytes": None, "path": "a.jpg"}], ["no_image"]),
        ([{"bytes": b"", "path": ""}], [None]),
        ([{"bytes": b"junk", "path": "x/y.jpg"}], [None]),
    ],
)
def test_a_bad_row_is_one_row(tmp_path, values, reasons):
    good = structs(IMAGES)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path = write(tmp_path / "a.parquet", {"image": pa.array([good[0], *values, *good[1:]], kind)}, row_group_size=3)
    samples = read(path)
    assert [sample.reason for sample in samples] == [None, *reasons, None, None, None, None]
    assert [sample.content for sample in samples if sample is not samples[1]] == IMAGES


def test_values_that_python_cannot_hold_cost_their_cell(tmp_path):
    invalid = pa.StringArray.from_buffers(5, *pa.array([b"a", b"b", b"\xff", b"d", b"e"]).buffers()[1:])
    late = pa.array([0, 1, 2**62, 3, 4], pa.timestamp("us"))
    samples = read(write(tmp_path / "a.parquet", {"image": IMAGES, "caption": invalid, "when": late}))
    assert [sample.content for sample in samples] == IMAGES
    assert [json.loads(sample.metadata) for sample in samples][1:3] == [{"caption": "b"}, {}]


def test_several_images_in_a_row_are_said(tmp_path):
    rows = [[IMAGES[0]], [IMAGES[1], IMAGES[2]], [], [None, IMAGES[3]], None]
    samples = read(write(tmp_path / "a.parquet", {"images": pa.array(rows, pa.list_(pa.binary()))}))
    assert [s.content for s in samples] == [IMAGES[0], IMAGES[1], None, IMAGES[3], None]
    assert [s.warning for s in samples] == [None, "several_images", None, None, None]
    assert [s.reason for s in samples] == [None, None, "no_image", None, "no_image"]


def test_keys_from_paths_with_dots(tmp_path):
    rows = [{"bytes": image, "path": f"Screenshot at 10.00.{i}.jpg"} for i, image in enumerate(IMAGES)]
    samples = read(write(tmp_path / "a.parquet", {"image": rows}))
    assert [sample.key for sample in samples] == [f"Screenshot at 10.00.{i}" for i in range(5)]


def test_too_large_a_cell_is_a_row(tmp_path):
    samples = read(write(tmp_path / "a.parquet", {"image": [IMAGES[0], b"x" * 5000, IMAGES[3]]}), limit=4999)
    assert [sample.reason for sample in samples] == [None, "file_too_large", None]


@pytest.mark.parametrize("kind", ["binary", "struct", "base64"])
@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_damaged_row_group_costs_its_rows_and_says_how_many(tmp_path, kind, group):
    columns = {"n": range(15), "image": pa.chunked_array([KINDS[kind]()] * 3)}
    path = write(tmp_path / "a.parquet", columns, row_group_size=5, compression="zstd", use_dictionary=False)
    about = pq.ParquetFile(path).metadata.row_group(group)
    column = next(about.column(i) for i in range(about.num_columns) if about.column(i).total_compressed_size > 2000)
    content = bytearray(path.read_bytes())
    start = column.data_page_offset
    content[start : start + 40] = bytes(40)
    path.write_bytes(content)
    samples = read(path)
    lost = [i for i, sample in enumerate(samples) if sample.reason]
    assert [samples[i].reason for i in lost] == ["damaged_shard"]
    assert (samples[lost[0]].key, samples[lost[0]].unread_images) == (f"a@{5 * group}", 5)
    assert 0 < (samples[lost[0]].unread_bytes or 0) <= path.stat().st_size
    assert [s.content for s in samples if not s.reason] == IMAGES * 2
    assert {s.unread_bytes for s in samples if not s.reason} == {None}


@pytest.mark.parametrize("cut", [0, 3, 100, -1])
def test_a_damaged_file_is_one_row_of_all_its_bytes(tmp_path, cut):
    path = write(tmp_path / "a.parquet", {"image": IMAGES})
    path.write_bytes(path.read_bytes()[:cut])
    (sample,) = read(path)
    assert (sample.key, sample.reason, sample.unread_bytes) == ("a@0", "damaged_shard", path.stat().st_size)


@pytest.mark.parametrize("columns", [{"text": ["no", "images"]}, {"n": [1, 2]}, {"tags": [["a"], ["b"]]}])
def test_a_file_without_images_has_a_row_for_each_of_its_rows(tmp_path, columns):
    samples = read(write(tmp_path / "a.parquet", columns))
    assert [(s.key, s.reason) for s in samples] == [("a_0", "no_image_column"), ("a_1", "no_image_column")]


def test_huge_rows_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    rows = [image + bytes(6 << 20) for image in IMAGES * 3]
    path = write(tmp_path / "a.parquet", {"image": rows}, compression="none", use_dictionary=False)
    held = []
    iter_batches = pq.ParquetFile.iter_batches

    def watched(self, *arguments, **options):
        for batch in iter_batches(self, *arguments, **options):
            held.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    assert [sample.content for sample in read(path, limit=1 << 25)] == rows
    assert max(held) <= 16 << 20
