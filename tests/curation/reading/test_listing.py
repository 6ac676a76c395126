"""What a URL holds, what is left out of it and why, and what is said where nothing can be had."""

import json
import os
import socket

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.planning.plan import describe
from curation.reading.listing import find_parts
from curation.reading.places import raw, readable
from curation.reading.sources import read_samples
from curation.run import main
from tests.conftest import encoded, picture, picture_tar
from tests.curation.planning.test_plan import make_run


def put(folder, *names, content=None):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i)) if content is None else content)


def ignored(listing):
    return {entry.reason: entry.count for entry in listing.ignored}


def names(listing):
    """The file names of shards, and of the files of folders."""
    return [name for part in listing for name in (part.files or [part.url.rpartition("/")[2]])]


# --- left out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".DS_Store", "system file"),
        ("sub/._a.jpg", "system file"),
        ("Thumbs.db", "system file"),
        ("desktop.ini", "system file"),
        ("__MACOSX/sub/a.jpg", "system file"),
        ("@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "system file"),
        ("$RECYCLE.BIN/a.jpg", "system file"),
        (".git/objects/a.jpg", "hidden"),
        (".hidden.jpg", "hidden"),
        (".ipynb_checkpoints/a-checkpoint.jpg", "hidden"),
        ("metadata.csv", "known metadata"),
        ("sub/metadata.jsonl", "known metadata"),
        ("dataset_info.json", "known metadata"),
        ("00000_stats.json", "known metadata"),
    ],
)
def test_what_is_no_image_of_the_pool_is_counted(tmp_path, name, reason):
    put(tmp_path, "a.jpg", "sub/b.jpg", name)
    listing = find_parts([str(tmp_path)])
    assert names(listing) == ["a.jpg", "sub/b.jpg"]
    assert ignored(listing) == {reason: 1}
    assert listing.ignored[0].example.startswith(str(tmp_path))
    assert find_parts([str(tmp_path)]) == listing


def test_a_hidden_place_that_is_asked_for_is_read(tmp_path):
    put(tmp_path, ".cache/a.jpg", ".cache/.b.jpg")
    assert names(find_parts([f"{tmp_path}/.cache"])) == ["a.jpg"]
    assert names(find_parts([f"{tmp_path}/.cache/.b.jpg"])) == [".b.jpg"]
    assert names(find_parts([f"{tmp_path}/.cache/*.jpg"])) == ["a.jpg"]


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_only_regular_files_are_opened(tmp_path, kind):
    put(tmp_path, "a.jpg")
    place = tmp_path / "b.jpg"
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(place))
    else:
        os.symlink("/dev/zero", place)
    for url in (tmp_path, f"{tmp_path}/*.jpg"):
        listing = find_parts([str(url)])
        assert (names(listing), ignored(listing)) == (["a.jpg"], {"not a regular file": 1})
    with pytest.raises(ValueError, match="not a regular file but a"):
        find_parts([str(place)])


def test_links_are_followed_once(tmp_path):
    put(tmp_path / "pool", "real/a.jpg", "b.jpg")
    put(tmp_path / "far", "c.jpg", "deep/d.jpg")
    os.symlink("real", tmp_path / "pool" / "a-link-before-it")
    os.symlink(tmp_path / "far", tmp_path / "pool" / "far")
    os.symlink(tmp_path / "pool", tmp_path / "far" / "loop")
    os.symlink("b.jpg", tmp_path / "pool" / "again.jpg")
    os.symlink(tmp_path / "far" / "c.jpg", tmp_path / "pool" / "c-again.jpg")
    os.symlink("nowhere.jpg", tmp_path / "pool" / "gone.jpg")
    listing = find_parts([str(tmp_path / "pool")])
    assert len(names(listing)) == 4
    assert {"real/a.jpg", "b.jpg", "far/deep/d.jpg"} < set(names(listing))
    assert ignored(listing) == {"already listed (link)": 4, "broken link": 1}
    assert all(sample.content for part in listing for sample in read_samples(part, 1 << 20))


def test_one_link_alone_is_read(tmp_path):
    put(tmp_path / "far", "c.jpg")
    picture_tar(tmp_path / "far" / "t.tar", range(1))
    for target in ("far", "far/c.jpg", "far/t.tar"):
        link = tmp_path / target.replace("/", "-")
        os.symlink(tmp_path / target, link if link.name != "far" else tmp_path / "link")
    assert len(find_parts([f"{tmp_path}/link"])) == 2
    assert names(find_parts([f"{tmp_path}/far-c.jpg"])) == ["far-c.jpg"]
    assert names(find_parts([f"{tmp_path}/far-t.tar"])) == ["far-t.tar"]


def test_the_same_folder_by_two_names_is_read_once(tmp_path):
    put(tmp_path / "pool", "a.jpg", "sub/b.jpg")
    os.symlink("pool", tmp_path / "link")
    once = find_parts([str(tmp_path / "pool")])
    assert find_parts([str(tmp_path / "pool")] * 2) == once
    assert find_parts([str(tmp_path / "pool"), str(tmp_path / "pool" / "sub"), f"{tmp_path}/link"]).parts == once.parts


# --- shards and pictures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["x.tar", "X.TAR", "sub/x.tgz", "x.parquet", "x.Parquet"])
def test_pictures_beside_shards_are_read(tmp_path, shard):
    put(tmp_path, "a.jpg", "sub/b.jpg", "photo")
    put(tmp_path, "a.txt", "checksums.txt", "x.idx", content=b"words")
    path = tmp_path / shard
    if "ar" in path.suffix.lower() and path.suffix.lower() != ".tar":
        pq.write_table(pa.table({"image": [encoded(picture(9))]}), path)
    else:
        picture_tar(path, range(2))
    listing = find_parts([str(tmp_path)])
    assert names(listing) == [path.name, "a.jpg", "a.txt", "photo", "sub/b.jpg"]
    assert ignored(listing) == {"unknown kind": 2}


@pytest.mark.parametrize("layout", ["imagefolder", "tars", "files"])
def test_tables_that_tell_about_images_are_metadata(tmp_path, layout):
    table = pa.table({"file_name": ["a.jpg"], "caption": ["a picture"], "sha256": [b"0" * 32]})
    tables = {"imagefolder": "metadata.parquet", "tars": "00000.parquet", "files": "00000.parquet"}
    put(tmp_path, *{"imagefolder": ["a.jpg"], "tars": [], "files": ["00000/a.jpg"]}[layout])
    if layout == "tars":
        picture_tar(tmp_path / "00000.tar", range(2))
        put(tmp_path, "00000_stats.json", content=b"{}")
    pq.write_table(table, tmp_path / tables[layout])
    listing = find_parts([str(tmp_path)])
    assert [part.kind for part in listing] == ["tar" if layout == "tars" else "folder"]
    assert ignored(listing) == {"known metadata": 2 if layout == "tars" else 1}


@pytest.mark.parametrize("name", ["metadata.parquet", "a.parquet", "00000.parquet"])
def test_a_table_with_images_is_a_shard_wherever_it_lies(tmp_path, name):
    put(tmp_path, "a.jpg", "00000/b.jpg")
    pq.write_table(pa.table({"caption": ["x"], "picture": [encoded(picture(3))]}), tmp_path / name)
    assert [part.kind for part in find_parts([str(tmp_path)])] == ["parquet", "folder"]


@pytest.mark.parametrize("pattern", ["a.jpg", "*.jpg", "{a,b}.jpg", "?.jpg", "sub/*/*.jpg", "**/*.jpg"])
def test_images_by_name_or_glob_are_a_pool(tmp_path, pattern):
    put(tmp_path, "a.jpg", "b.jpg", "sub/x/c.jpg", "sub/y/d.jpg", "notes.txt")
    expected = {"a.jpg": 1, "*.jpg": 2, "{a,b}.jpg": 2, "?.jpg": 2, "sub/*/*.jpg": 2, "**/*.jpg": 4}[pattern]
    listing = find_parts([f"{tmp_path}/{pattern}"])
    assert len(listing) == 1
    samples = list(read_samples(listing[0], 1 << 20))
    assert len(samples) == expected == len({sample.key for sample in samples})
    assert all(sample.content for sample in samples)


@pytest.mark.parametrize("name", ["x[1].tar", "a*b.tar", "{1,2}.tar", "a::b.tar", "q?.tar"])
def test_the_literal_name_comes_first(tmp_path, name):
    picture_tar(tmp_path / name, range(1))
    for decoy in ("x1.tar", "aXb.tar", "1.tar", "2.tar", "qX.tar"):
        picture_tar(tmp_path / decoy, range(1))
    assert names(find_parts([f"{tmp_path}/{name}"])) == [name]


@pytest.mark.parametrize(
    "name", ["plain", "日本 %41 ~", "lit\\xe9", "a\udce9b", "\udcff\\xff", "\\x5cxe9", "\\x", "\\xzz"]
)
def test_names_are_written_so_that_they_come_back(name):
    assert raw(readable(name)) == name
    assert readable(name).encode()
    if not any(c in name for c in "\\\udce9\udcff"):
        assert readable(name) == name


def test_a_file_that_is_named_is_known_by_its_content(tmp_path):
    picture_tar(tmp_path / "shard", range(1))
    pq.write_table(pa.table({"image": [encoded(picture(3))]}), tmp_path / "table")
    put(tmp_path, "photo")
    kinds = [find_parts([str(tmp_path / name)])[0].kind for name in ("shard", "table", "photo")]
    assert kinds == ["tar", "parquet", "folder"]


def test_a_part_is_another_when_any_of_its_files_is(tmp_path):
    put(tmp_path, "a.jpg", "b.jpg")
    before = find_parts([str(tmp_path)])[0].id
    assert find_parts([str(tmp_path)])[0].id == before
    os.utime(tmp_path / "b.jpg", (1, 1))
    assert find_parts([str(tmp_path)])[0].id != before
    put(tmp_path, "c.jpg")
    assert len({find_parts([str(tmp_path)])[0].id, before}) == 2


def test_hard_links_are_files_of_their_own(tmp_path):
    first = tmp_path / "d0" / "0.jpg"
    put(tmp_path, "d0/0.jpg")
    for folder in range(10):
        (tmp_path / f"d{folder}").mkdir(exist_ok=True)
        for number in range(500):
            if folder or number:
                os.link(first, tmp_path / f"d{folder}" / f"{number}.jpg")
    assert sum(len(part.files) for part in find_parts([str(tmp_path)])) == 5_000


# --- the run folder --------------------------------------------------------------------------------------------------


def test_what_lies_in_the_run_folder_is_no_input(tmp_path):
    put(tmp_path, "a.jpg", "run/demo/x.jpg", "run-other/b.jpg")
    picture_tar(tmp_path / "run" / "shards" / "shard-000000.tar", range(3))
    for out in (tmp_path / "run", f"{tmp_path}/./run/", f"file://{tmp_path}/run"):
        listing = find_parts([str(tmp_path)], run_folder=str(out))
        assert (names(listing), ignored(listing)) == (["a.jpg", "run-other/b.jpg"], {"in the run folder": 2})
    listing = find_parts([f"{tmp_path}/**/*"], run_folder=str(tmp_path / "run"))
    assert sorted(names(listing)) == ["a.jpg", "b.jpg"]
    assert "in the run folder" in ignored(listing)
    os.symlink("run", tmp_path / "link")
    assert ignored(find_parts([str(tmp_path)], run_folder=str(tmp_path / "run"))) == {"in the run folder": 4}
    with pytest.raises(ValueError, match=r"lies in the run folder .* another --out"):
        find_parts([f"{tmp_path}/run/shards"], run_folder=str(tmp_path / "run"))


def test_the_run_folder_in_a_store_is_no_input():
    fs = fsspec.filesystem("memory")
    for name in ("/own/pool/a.jpg", "/own/pool/run/shards/b.jpg", "/own/pool/.git/c", "/own/pool/Thumbs.db"):
        fs.pipe_file(name, encoded(picture(1)))
    listing = find_parts(["memory://own/pool"], run_folder="memory://own/pool/run")
    assert names(listing) == ["a.jpg"]
    assert ignored(listing) == {"in the run folder": 1, "hidden": 1, "system file": 1}


def test_the_plan_says_what_is_left_out(tmp_path):
    put(tmp_path / "pool", "a.jpg", ".DS_Store", "run/b.jpg")
    picture_tar(tmp_path / "seed.tar", range(2))
    picture_tar(tmp_path / "exam.tar", range(2))
    run = make_run(tmp_path, pool=str(tmp_path / "pool"))
    text = describe(run)
    assert f"pool: ignored, system file: 1 ({tmp_path}/pool/.DS_Store)" in text


def test_the_same_command_twice_reads_the_same(tmp_path, capsys):
    """--out inside the pool's folder."""
    put(tmp_path, *(f"{i}.jpg" for i in range(4)))
    picture_tar(tmp_path / "run" / "shards" / "shard-000000.tar", range(3))
    (tmp_path / "run" / "shards" / "started.json").write_text(json.dumps("0" * 32))
    (tmp_path / "run" / "run.json").write_text(json.dumps(dict.fromkeys(("seeds", "pool", "evaluations", "config"))))
    command = ["--pool", str(tmp_path), "--seed", str(tmp_path), "--config", "offline", "--out", str(tmp_path / "run")]
    assert main([*command, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "pool: ignored, in the run folder: 3" in out
    assert "seed" in out


# --- nothing there, and why ------------------------------------------------------------------------------------------


def test_braces_say_what_is_missing(tmp_path):
    for number in (0, 1, 5):
        picture_tar(tmp_path / f"pool-{number:03d}.tar", range(1))
    listing = find_parts([f"{tmp_path}/pool-{{000..009}}.tar"])
    assert names(listing) == ["pool-000.tar", "pool-001.tar", "pool-005.tar"]
    assert (listing.num_missing, len(listing.missing)) == (7, 3)
    (note,) = listing.notes()
    assert "missing, named in braces: 7 (" in note
    assert "pool-002.tar" in note
    assert "and 4 more" in note
    listing = find_parts([f"{tmp_path}/{{pool,other}}-*.tar"])
    assert (len(listing), listing.num_missing, listing.missing) == (3, 1, (f"{tmp_path}/other-*.tar",))
    assert find_parts([f"{tmp_path}/pool-00{{0,1}}.tar"]).notes() == []


def test_braces_in_a_store_say_what_is_missing():
    fsspec.filesystem("memory").pipe_file("/braces/1.tar", b"")
    listing = find_parts(["memory://braces/{0..2}.tar"])
    assert listing.missing == ("memory://braces/0.tar", "memory://braces/2.tar")


@pytest.mark.parametrize("value", ["", " ", "\t"])
@pytest.mark.parametrize("flag", ["--pool", "--seed", "--evaluation", "--out", "--seed-root", "--image-column"])
def test_an_empty_value_is_refused_by_its_flag(tmp_path, monkeypatch, capsys, flag, value):
    monkeypatch.chdir(tmp_path)
    picture_tar(tmp_path / "a.tar", range(2))
    command = ["--pool", "a.tar", "--seed", "./a.tar", "--config", "offline", "--out", "run"]
    assert main([*command, flag, value, "--dry-run"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {flag} is empty")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", ["an empty address"]),
        ("{tmp}/no/such/pool.tar", ["nothing found", "is there, but nothing called 'no' in it"]),
        ("{tmp}/a.jpg/pool.tar", ["nothing found"]),
        ("{tmp}/*.tar", ["nothing found", "{tmp} is there"]),
        ("{tmp}/pool-{{000..009}}.tar", ["nothing found"]),
        ("{tmp}/empty", ["the folder is empty"]),
        ("{tmp}/system", ["nothing to read", "system file: 2", ".DS_Store"]),
        ("{tmp}/notes.md", ["neither a .tar", "nor an image"]),
        ("{tmp}/pool-{{000..", ["cannot read"]),
        ("{tmp}/{{0..99999999}}.tar", ["1,000,000 names"]),
        ("/dev/null", ["not a regular file but a device"]),
        ("nosuch://bucket/a.tar", ["cannot read", "nosuch"]),
    ],
)
def test_wrong_addresses(tmp_path, url, words):
    put(tmp_path, "a.jpg", "notes.md", content=b"x")
    put(tmp_path / "system", ".DS_Store", "Thumbs.db")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=" ") as error:
        find_parts([url.replace("{tmp}", str(tmp_path)).replace("{{", "{").replace("}}", "}")])
    for word in words:
        assert word.replace("{tmp}", str(tmp_path)) in str(error.value)


def test_an_empty_folder_beside_a_good_one_is_said(tmp_path):
    put(tmp_path, "pool/a.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="the folder is empty"):
        find_parts([f"{tmp_path}/pool", f"{tmp_path}/empty"])


@pytest.fixture
def closed_port():
    with socket.socket() as listener:  # a port that is ours, and closed again before the call
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("name", ["a.tar", "*.tar", "{0..2}.tar", "folder/"])
@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_refused_connection_is_said(monkeypatch, closed_port, scheme, name):
    if scheme == "http" and "*" in name:
        pytest.skip("a web server has no listing to ask for")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    address = f"http://127.0.0.1:{closed_port}"
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": address, "skip_instance_cache": True})
    with pytest.raises(ValueError, match=r"cannot list .*(connect|Connect)"):
        find_parts([f"{address}/{name}" if scheme == "http" else f"s3://bucket/{name}"])
