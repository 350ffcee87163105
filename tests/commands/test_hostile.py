"""Files that somebody has spoiled, on purpose or not: one line, exit code 2, nothing written, and no code run."""

import html
import io
import json
import os
import pickle
import shutil
import signal
import struct
import tarfile
import zipfile
import zlib
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from deq_jax import convert, evaluate, report, train
from deq_jax.evaluation import read_record
from deq_jax.interop import mdeq_shapes, to_torch
from deq_jax.storage import load_config, read_json, write_json
from deq_jax.storage.checkpoints import Checkpoints
from deq_jax.training import TrainConfig

ARCHIVE = Path(__file__).parents[1] / "golden" / "workdir-0.1.tar.xz"  # a run and its evaluations
COMMANDS = {"train": train.main, "evaluate": evaluate.main, "convert": convert.main, "report": report.main}
CONFIGS = {
    "own.py": """
from pathlib import Path
from deq_jax.storage import from_tree, read_json

def get_config():
    return from_tree(read_json(Path("own.json")))
""",
    "images.py": """
from dataclasses import replace
from pathlib import Path
from deq_jax.data import ImageFolder
from deq_jax.storage import from_tree, read_json

def get_config():
    return replace(from_tree(read_json(Path("own.json"))), dataset=ImageFolder("images", cache="cache.npz"))
""",
    "cifar.py": """
from dataclasses import replace
from pathlib import Path
from deq_jax.data import Cifar
from deq_jax.storage import from_tree, read_json

def get_config():
    return replace(from_tree(read_json(Path("own.json"))), dataset=Cifar("cifar.tar"))
""",
    "half.py": """
from pathlib import Path
from deq_jax.storage import from_tree, read_json

def get_config(train):
    return from_tree(read_json(Path("run/evaluation/half/manifest.json"))["config"])
""",
    "mdeq.py": """
from deq_jax import Broyden, Dynamics, Equilibrium, Standard, TrainConfig
from deq_jax.data import Digits
from deq_jax.models import mdeq

def get_config():
    network = mdeq(10, (8, 8), (2, 2), final_channels=8, expansion=1)
    return TrainConfig(Equilibrium(*network, Dynamics(Broyden(2))), Standard(), Digits())
""",
}
NEW = "--config own.py --workdir new"
RESUMED = "--config own.py --workdir run"
HALF = "run/evaluation/half"
RESUMED_HALF = f"evaluate --workdir run --config half.py --out {HALF}"
IMAGES = "train --config images.py --workdir new"
CIFAR = "train --config cifar.py --workdir new"
REPORT = "report run --out new"
MDEQ = "convert {} --config mdeq.py --out new"
EVALUATION = "run/evaluation/test-eval_config"


class Hostile:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def text(name, content):
    """Writes a file."""

    def spoil():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def edited(name, change):
    """Changes a file of JSON."""

    def spoil():
        tree = json.loads(Path(name).read_text())
        tree = change(tree) or tree
        Path(name).write_text(json.dumps(tree))

    return spoil


def config(**changes):
    return edited("run/config.json", lambda tree: tree.update(changes))


def arrays(name, **changes):
    """Exchanges arrays of an npz file; None leaves one out."""

    def spoil():
        with np.load(name) as file:
            kept = dict(file) | changes
        np.savez(name, **{key: value for key, value in kept.items() if value is not None})

    return spoil


def member(name, member, content):
    """Exchanges a file in an npz file."""

    def spoil():
        with zipfile.ZipFile(name) as file:
            members = {one: file.read(one) for one in file.namelist()} | {member: content}
        with zipfile.ZipFile(name, "w") as file:
            for one, data in members.items():
                file.writestr(one, data)

    return spoil


def npy(shape, dtype="<f4", data=b""):
    """A file of one array that promises more than it holds."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def objects(name, key):
    def spoil():
        whole = np.empty(1, object)
        whole[0] = Hostile()
        arrays(name, **{key: whole})()

    return spoil


def png(size=(8, 8), *, data=b""):
    """An image file of any sizes and content."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def image(content, name="images/dog/9.png"):
    return text(name, content)


def tar(**members):
    """An archive of CIFAR; a member is its content, or is made of its header alone."""

    def spoil():
        with tarfile.open("cifar.tar", "w") as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(name.replace("__", "/"))
                if isinstance(content, bytes):
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
                else:
                    content(info)
                    archive.addfile(info)

    return spoil


def link(target):
    def make(info):
        info.type, info.linkname = tarfile.SYMTYPE, target

    return make


def state_dict(**changes):
    return arrays("good.npz", **changes)


def safetensors(header, data=b""):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return text("bad.safetensors", struct.pack("<Q", len(content)) + content + data)


def checkpoint(meta=None, state=None, step="3"):
    """Another best checkpoint, as a version without digests wrote it."""

    def spoil():
        path = Path("run/checkpoints/best/3")
        if state is not None or meta is not None:
            shutil.rmtree(path)
            handler = ocp.CompositeCheckpointHandler()
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state or {"w": np.ones(3)}), meta=ocp.args.JsonSave(meta or {})
            )
            with ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(path.absolute(), args=items)
        path.rename(path.with_name(step))

    return spoil


def latest(meta):
    """The latest checkpoint with other meta data."""

    def spoil():
        checkpoints = Checkpoints(Path("run/checkpoints/latest"), keep=1)
        found = checkpoints.read()
        checkpoints.save(9, found.state, meta if not isinstance(meta, dict) else {**found.meta, **meta})

    return spoil


def both(*spoils):
    return lambda: [spoil() for spoil in spoils]


def nothing():
    """What is typed alone is bad."""


DEEP = "[" * 50_000 + "]" * 50_000
ESCAPE = "\x1b]0;owned\x07"

ATTEMPTS = {
    # configs that are Python files
    "config-value-error": (
        text("own.py", "def get_config():\n    return int('x')\n"),
        f"train {NEW}",
        "own.py: line 2",
    ),
    "config-division": (text("own.py", "x = 3\ny = x / 0\n"), f"train {NEW}", "own.py: line 2: ZeroDivisionError"),
    "config-key-error": (
        text("own.py", "def get_config():\n    return {}['x']\n"),
        f"train {NEW}",
        "line 2: get_config() failed: KeyError",
    ),
    "config-exits": (text("own.py", "import sys\nsys.exit(0)\n"), f"train {NEW}", "own.py: line 2: SystemExit"),
    "config-null": (text("own.py", b"x = 3\0\n"), f"train {NEW}", "own.py"),
    "config-encoding": (text("own.py", b"\xff\xfe\x00"), f"train {NEW}", "own.py"),
    "config-recursion": (
        text("own.py", "def get_config():\n    return get_config()\n"),
        f"train {NEW}",
        "line 2: get_config() failed: RecursionError",
    ),
    "config-no-function": (text("own.py", "get_config = 3\n"), f"train {NEW}", "own.py"),
    "config-file-missing": (text("own.py", "open('nowhere')\n"), f"train {NEW}", "own.py: line 1: FileNotFoundError"),
    # --set and other numbers
    "set-huge-epochs": (nothing, f"train {NEW} --set epochs={10**30}", "epochs"),
    "set-many-signs": (nothing, f"train {NEW} --set seed={'-' * 9000}1", "--set seed=---"),
    "set-many-brackets": (nothing, f"train {NEW} --set seed={'(' * 9000}1", "--set seed=((("),
    "set-no-name": (nothing, f"train {NEW} --set =3", "no field "),
    "set-dots": (nothing, f"train {NEW} --set ..seed=3", "no field "),
    "set-attribute": (nothing, f"train {NEW} --set __class__.x=3", "no field __class__"),
    "set-infinite": (nothing, f"train {NEW} --set validation_attack.threat.epsilon=1e999", "epsilon"),
    "set-markup": (nothing, f"train {NEW} --set [/bold]{ESCAPE}=3", "no field [/bold]"),
    "epsilon-nan": (nothing, "evaluate --workdir run --epsilon nan", "epsilon must be"),
    "epsilon-infinite": (nothing, "evaluate --workdir run --epsilon inf", "epsilon must be"),
    "batch-huge": (nothing, f"evaluate --workdir run --batch-size {8 * 10**12}", "batch_size"),
    "transfer-above": (nothing, f"evaluate --workdir run --transfer ../../x={EVALUATION}", "Trial: a name consists of"),
    "transfer-empty": (nothing, "evaluate --workdir run --attack transfer:", "expected a trial's files"),
    "processes-none": (nothing, f"train {NEW} --processes 0", "processes"),
    # arrays
    "npz-bytes": (member("digits200.npz", "x_train.npy", b"no array"), f"train {NEW}", "digits200.npz"),
    "npz-objects": (objects("digits200.npz", "y_train"), f"train {NEW}", "digits200.npz: cannot be read"),
    "npz-promises": (member("digits200.npz", "x_train.npy", npy((10**13,))), f"train {NEW}", "digits200.npz"),
    "npz-negative": (member("digits200.npz", "x_train.npy", npy((-5, 8, 8))), f"train {NEW}", "digits200.npz"),
    "npz-code": (
        member("digits200.npz", "x_train.npy", npy("__import__('os').mkdir('executed')")),
        f"train {NEW}",
        "digits200.npz",
    ),
    "npz-one-array": (text("digits200.npz", npy((1,), data=b"abcd")), f"train {NEW}", "digits200.npz"),
    "npz-complex": (arrays("digits200.npz", x_train=np.zeros((160, 8, 8), complex)), f"train {NEW}", "complex128"),
    "npz-texts": (arrays("digits200.npz", y_test=np.array(["a"] * 24)), f"train {NEW}", "labels must be integers"),
    "npz-records": (arrays("digits200.npz", y_test=np.zeros(24, "i4,i4")), f"train {NEW}", "labels must be integers"),
    "npz-scalars": (arrays("digits200.npz", x_test=np.float32(1)), f"train {NEW}", "images must be"),
    "npz-empty": (text("digits200.npz", b"PK\5\6" + bytes(18)), f"train {NEW}", "missing x_train"),
    # folders of images
    "image-postscript": (
        image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(executed) (w) file\n%%EOF\n"),
        IMAGES,
        "9.png: cannot be read as an image",
    ),
    "image-bomb": (image(png((60_000, 60_000))), IMAGES, "9.png: cannot be read"),
    "image-stream": (
        image(png(data=b"\x78\x9c" + b"\xff" * 30)),
        IMAGES,
        "9.png: cannot be read",
    ),
    "image-tiff": (
        image(b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 300, "images/dog/9.tif"),
        IMAGES,
        "9.tif: cannot be read",
    ),
    "image-pipe": (
        lambda: os.mkfifo("images/dog/9.png"),
        IMAGES,
        "9.png: cannot be read",
    ),
    "image-control-characters": (
        image(b"no image", f"images/dog/{ESCAPE}.png"),
        IMAGES,
        r"images/dog/\x1b]0;owned\x07.png: cannot be read as an image",
    ),
    "image-no-unicode": (
        text(os.fsdecode(b"images/a\xff/1.png"), b"no image"),
        IMAGES,
        "cannot be read as an image",
    ),
    "cache-pickle": (
        text("cache.npz", pickle.dumps(Hostile())),
        IMAGES,
        "cache.npz: cannot be read",
    ),
    "cache-bytes": (
        both(lambda: np.savez("cache.npz", digest=np.array("x")), member("cache.npz", "digest.npy", b"x")),
        IMAGES,
        "cache.npz: ",
    ),
    # archives of CIFAR
    "tar-links": (tar(test_batch=link("/etc/passwd")), CIFAR, "expected the files"),
    "tar-above": (
        tar(**{"..__..__test_batch": pickle.dumps(Hostile(), 2)}),
        CIFAR,
        "incomplete",
    ),
    "tar-huge": (
        tar(test_batch=lambda info: setattr(info, "size", 2**40)),
        CIFAR,
        "cifar.tar",
    ),
    "tar-no-unicode": (text("cifar.tar", b"\xff" * 1024), CIFAR, "cifar.tar"),
    "tar-recursive": (
        tar(**{f"data_batch_{i}": b"\x80\x02]q\0h\0a." for i in range(1, 6)}, test_batch=b"\x80\x02]q\0h\0a."),
        CIFAR,
        "expected a dict, found a list",
    ),
    "tar-stream": (
        text("cifar.tar", b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\x07" * 600),
        CIFAR,
        "cifar.tar: cannot be read",
    ),
    # state dicts
    "state-bytes": (member("good.npz", "classifier.bias.npy", b"x"), MDEQ.format("good.npz"), "good.npz"),
    "state-channels": (
        state_dict(**{"downsample.0.weight": np.zeros((0, 10**11, 3, 3), np.float32)}),
        MDEQ.format("good.npz"),
        "good.npz",
    ),
    "state-dots": (state_dict(**{"." * 60_000: np.zeros(1)}), MDEQ.format("good.npz"), "1 unexpected"),
    "state-control-characters": (
        state_dict(**{f"a{ESCAPE}": np.zeros(1)}),
        MDEQ.format("good.npz"),
        r"1 unexpected: a\x1b]0;owned\x07",
    ),
    "state-complex": (
        state_dict(**{"classifier.bias": np.zeros(10, complex)}),
        MDEQ.format("good.npz"),
        "expected floating numbers",
    ),
    "state-none": (text("good.npz", b"PK\5\6" + bytes(18)), MDEQ.format("good.npz"), "missing"),
    "safetensors-length": (
        text("bad.safetensors", struct.pack("<Q", 2**60)),
        MDEQ.format("bad.safetensors"),
        "bad.safetensors: not read",
    ),
    "safetensors-offsets": (
        safetensors({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        MDEQ.format("bad.safetensors"),
        "bad.safetensors: not read",
    ),
    "safetensors-deep": (safetensors(DEEP.encode()), MDEQ.format("bad.safetensors"), "bad.safetensors: not read"),
    "safetensors-type": (
        safetensors({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}, b"a"),
        MDEQ.format("bad.safetensors"),
        "bad.safetensors",
    ),
    # the config of a run
    "run-deep": (text("run/config.json", DEEP), "evaluate --workdir run", "run/config.json"),
    "run-bytes": (text("run/config.json", b"\xff\xfe{}"), "evaluate --workdir run", "config.json: not a text"),
    "run-null": (text("run/config.json", "null"), "evaluate --workdir run", "expected a TrainConfig, found None"),
    "run-class-list": (config(classifier={"class": ["a"]}), "evaluate --workdir run", "config"),
    "run-name-object": (config(objective={"name": {"a": 1}}), "evaluate --workdir run", "config"),
    "run-standard-library": (config(dataset={"class": "antigravity.X"}), "evaluate --workdir run", "antigravity.X"),
    "run-ends-python": (config(dataset={"class": "unittest.__main__.X"}), "evaluate --workdir run", "unittest"),
    "run-system": (config(dataset={"name": "os.system"}), "evaluate --workdir run", "os.system"),
    "run-module": (
        config(dataset={"name": "deq_jax.storage.files.json"}),
        "evaluate --workdir run",
        "deq_jax.storage.files.json",
    ),
    "run-module-fails": (
        both(text("broken.py", "1 / 0\n"), config(dataset={"class": "broken.Mine"})),
        "evaluate --workdir run",
        "broken",
    ),
    "run-no-class": (config(classifier=3), "evaluate --workdir run", "config"),
    "run-field-text": (
        config(classifier={"class": "deq_jax.models.Explicit", "network": "a"}),
        "evaluate --workdir run",
        "config",
    ),
    "run-channels": (
        edited("run/config.json", lambda tree: tree["classifier"]["cell"].update(channels="many")),
        "evaluate --workdir run",
        "does not fit images",
    ),
    "run-negative": (
        edited("run/config.json", lambda tree: tree["classifier"]["encoder"].update(channels=-4)),
        "evaluate --workdir run",
        "does not fit images",
    ),
    "run-flax-fields": (
        edited("run/config.json", lambda tree: tree["classifier"]["encoder"].update(parent="a", name=3)),
        "evaluate --workdir run",
        "config",
    ),
    "resumed-class-list": (config(classifier={"class": ["a"]}), f"train {RESUMED}", "another config"),
    "resumed-deep": (text("run/config.json", DEEP), f"train {RESUMED}", "run/config.json"),
    # other files of a run
    "lock-bytes": (text("run/lock.json", b"\xff\xfe\0"), f"train {RESUMED} --set seed=1", "another config"),
    "lock-deep": (text("run/lock.json", DEEP), f"train {RESUMED} --set seed=1", "another config"),
    "lock-link": (
        lambda: Path("run/lock.json").symlink_to("../../outside.txt"),
        f"train {RESUMED} --set seed=1",
        "lock.json is a link",
    ),
    "metrics-bytes": (text("run/metrics.jsonl", b"\xff\xfe\n{}\n"), f"train {RESUMED}", "metrics.jsonl"),
    "metrics-numbers": (text("run/metrics.jsonl", '3\n{"step": "a"}\n'), f"train {RESUMED}", "metrics.jsonl"),
    "metrics-deep": (text("run/metrics.jsonl", f"{DEEP}\n" + '{"step": 1}\n'), f"train {RESUMED}", "metrics.jsonl"),
    "environment-step": (
        text("run/environment.json", '[{"step": "a"}]'),
        f"train {RESUMED}",
        "expected a list of environments",
    ),
    "environment-parts": (
        text("run/environment.json", '[{"step": 0, "settings": null}]'),
        f"train {RESUMED}",
        "expected a list of environments",
    ),
    "checkpoint-superscript": (checkpoint(step="3²"), "evaluate --workdir run", "has no best checkpoint"),
    "checkpoint-far": (checkpoint(step="9" * 30), "evaluate --workdir run", "has no best checkpoint"),
    "checkpoint-no-arrays": (
        checkpoint(state={"params": {"a": 3}, "batch_stats": {}}),
        "evaluate --workdir run",
        "does not fit",
    ),
    "checkpoint-meta-list": (latest([1]), f"train {RESUMED}", "checkpoints/latest/9"),
    "checkpoint-meta-text": (
        latest({"best_accuracy": "high", "not_better": None}),
        f"train {RESUMED}",
        "checkpoints/latest/9",
    ),
    "checkpoint-origin": (latest({"origin": {"a": 3}}), f"train {RESUMED}", "checkpoints/latest/9"),
    "digests-deep": (text("run/checkpoints/best/3/digests.json", DEEP), "evaluate --workdir run", "best/3 is damaged"),
    "digests-above": (
        text("run/checkpoints/best/3/digests.json", '{"../../../../../outside.txt": "a"}'),
        "evaluate --workdir run",
        "best/3 is damaged",
    ),
    # an evaluation that goes on
    "manifest-list": (
        text("out/manifest.json", "[]"),
        "evaluate --workdir run --attack none --out out",
        "out/manifest.json",
    ),
    "manifest-class": (
        text("out/manifest.json", '{"class": {"a": 3}}'),
        "evaluate --workdir run --attack none --out out",
        "out/manifest.json: not the manifest",
    ),
    "manifest-trials": (
        edited(f"{EVALUATION}/manifest.json", lambda tree: tree["config"]["trials"][0].update(name=3)),
        f"evaluate --workdir run --transfer a={EVALUATION}",
        "",
    ),
    "manifest-above": (
        edited(f"{EVALUATION}/manifest.json", lambda tree: tree["config"]["trials"][0].update(name="../../..")),
        f"evaluate --workdir run --transfer a={EVALUATION}",
        "Trial: a name consists of",
    ),
    "manifest-incomplete": (
        edited(f"{EVALUATION}/manifest.json", lambda tree: tree.pop("variables") and None),
        f"evaluate --workdir run --transfer reference={EVALUATION}",
        "expected images made against the undefended predictor",
    ),
    "transfer-numbers": (
        arrays(f"{EVALUATION}/trials/apgd/batch-0001.npz", number=np.array([-100, 5])),
        f"evaluate --workdir run --transfer a={EVALUATION}",
        "batch-0001.npz: expected x_adv",
    ),
    "kept-incomplete": (arrays(f"{HALF}/trials/clean/batch-0001.npz", seconds=None), RESUMED_HALF, "batch 1: the kept"),
    "kept-others": (
        arrays(f"{HALF}/trials/clean/batch-0002.npz", number=np.arange(8)),
        RESUMED_HALF,
        "trial clean, batch 2: the kept file is of other images or incomplete",
    ),
    "kept-one-axis": (arrays(f"{HALF}/trials/clean/batch-0000.npz", label=np.zeros(8)), RESUMED_HALF, "batch 0: the"),
    "kept-texts": (
        arrays(f"{HALF}/trials/clean/batch-0000.npz", margin=np.array([["a"] * 6] * 8)),
        RESUMED_HALF,
        "batch 0",
    ),
    # reports
    "report-infinite": (
        edited(f"{EVALUATION}/evaluation.json", lambda tree: tree.update(images=float("inf"))),
        REPORT,
        "evaluation.json: not an evaluation",
    ),
    "report-deep": (text(f"{EVALUATION}/evaluation.json", DEEP), REPORT, "evaluation.json"),
    "report-radius": (
        edited(f"{EVALUATION}/evaluation.json", lambda tree: tree["evaluation"]["threat"].update(epsilon=float("nan"))),
        REPORT,
        "evaluation.json: not an evaluation",
    ),
    "report-suite": (
        edited(f"{EVALUATION}/evaluation.json", lambda tree: tree["evaluation"]["trials"][0].update(suite=["a"])),
        REPORT,
        "evaluation.json: not an evaluation",
    ),
    "report-checkpoint": (
        edited(f"{EVALUATION}/evaluation.json", lambda tree: tree.update(checkpoint=3)),
        REPORT,
        "evaluation.json: not an evaluation",
    ),
    "report-flag": (
        edited(f"{EVALUATION}/evaluation.json", lambda tree: tree["red_flags"][0].update(value="high", raised="yes")),
        REPORT,
        "evaluation.json: not an evaluation",
    ),
    "report-large-number": (
        edited(f"{EVALUATION}/evaluation.json", lambda tree: tree["red_flags"][0].update(threshold=10**400)),
        REPORT,
        "evaluation.json: not an evaluation",
    ),
    "report-classes": (
        edited(
            f"{EVALUATION}/evaluation.json",
            lambda tree: tree.update(classes=[{"name": 3, "images": "a", "clean": None}]),
        ),
        REPORT,
        "evaluation.json: not an evaluation",
    ),
    "report-spread": (
        edited(f"{EVALUATION}/evaluation.json", lambda tree: tree["spectral_radius"].update(mean=0.5, largest=None)),
        REPORT,
        "evaluation.json: not an evaluation",
    ),
    "report-no-images": (
        edited(f"{EVALUATION}/evaluation.json", lambda tree: tree.update(images=0)),
        REPORT,
        "evaluation.json: not an evaluation",
    ),
    "report-one-axis": (
        arrays(f"{EVALUATION}/evaluation.npz", clean_label=np.zeros(24, int)),
        REPORT,
        "evaluation.json: not an evaluation",
    ),
    "report-bytes": (
        member(f"{EVALUATION}/evaluation.npz", "y.npy", b"x"),
        REPORT,
        "evaluation.json: not an evaluation",
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """All that is good: a run with evaluations, images in files, a network of PyTorch, and configs."""
    place = tmp_path_factory.mktemp("hostile")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(place, filter="data")
    for name, content in CONFIGS.items():
        (place / name).write_text(content)
    shutil.copy(place / "run" / "config.json", place / "own.json")
    for name in ("cat", "dog"):
        (place / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8)).save(place / "images" / name / f"{i}.png")
    manifest = read_json(place / HALF / "manifest.json")
    write_json(place / HALF / "manifest.json", manifest | {name: version(name) for name in ("deq_jax", "jax")})
    shapes = mdeq_shapes(load_config(place / "mdeq.py", TrainConfig))
    np.savez(place / "good.npz", **to_torch(jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)))
    return place


@pytest.fixture
def folder(place, tmp_path, monkeypatch):
    """A copy of it that may be spoiled, as the current folder."""
    (tmp_path / "outside.txt").write_text("not ours")
    shutil.copytree(place, tmp_path / "inside")
    monkeypatch.chdir(tmp_path / "inside")
    return tmp_path


def contents(folder):
    """All there is below a folder, links not followed; without locks, which end with the command."""
    kinds = {path: path.is_file() and not path.is_symlink() for path in folder.rglob("*")}
    return {path: is_file and path.read_bytes() for path, is_file in kinds.items() if path.name != "lock.json"}


@pytest.fixture
def in_time():
    """Fails a command that waits, or runs on."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ATTEMPTS)
def test_what_is_bad_is_one_line(name, folder, in_time, capfd):
    spoil, command, words = ATTEMPTS[name]
    spoil()
    before = contents(folder)
    capfd.readouterr()
    command, *arguments = command.split()
    with pytest.raises(SystemExit) as exit:
        COMMANDS[command](arguments)
    lines = capfd.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert lines[0].isprintable(), lines
    assert words in lines[0]
    assert contents(folder) == before


NAMES = f"[/red]{ESCAPE}", "$\\foo$", "<script>", "\udcff", "../" * 100, "=1+1"


def test_names_in_a_state_dict_are_shown_as_they_are(folder, capfd):
    with np.load("good.npz") as file:
        inside = {f"module.{name}": array for name, array in file.items()}
    np.savez("good.npz", **inside, **{name: np.zeros(1) for name in NAMES[:3]})
    convert.main(MDEQ.format("good.npz").split()[1:])
    line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("left out: "))
    assert r"[/red]\x1b]0;owned\x07" in line and "<script>" in line and line.isprintable()


@pytest.mark.parametrize("name", NAMES, ids=["markup", "formula", "html", "bytes", "above", "sheet"])
def test_names_in_an_evaluation_are_shown_as_they_are(name, folder, capfd):
    """Of its defence, its suites and its classes; all that is written is in its folder."""

    def rename(tree):
        tree.update(defence=name, workdir=name, classes=[{"name": name, "images": 24, "clean": 0.5}])
        tree["accuracy"] = {name if row == "AutoAttack" else row: kept for row, kept in tree["accuracy"].items()}
        for trial in tree["evaluation"]["trials"]:
            trial["suite"] = trial["suite"] and name

    edited(f"{EVALUATION}/evaluation.json", rename)()
    with np.load(f"{EVALUATION}/evaluation.npz") as file:
        rows = np.array([name if row == "AutoAttack" else str(row) for row in file["rows"]])
    arrays(f"{EVALUATION}/evaluation.npz", rows=rows)()
    before = contents(folder)
    report.main(["run", "--out", "new"])
    page = Path("new/index.html").read_text()
    assert read_record(Path(EVALUATION, "evaluation.json")).defence == name
    shown = name.encode(errors="backslashreplace").decode()
    assert "<script>" not in page and html.escape(shown, quote=False) in page.replace("&#34;", '"').replace(
        "&#39;", "'"
    )
    assert all(path.is_relative_to(folder / "inside" / "new") for path in contents(folder).keys() - before.keys())


def test_a_page_that_cannot_be_written_leaves_nothing_half(folder, capfd):
    Path("new/index.html").mkdir(parents=True)
    with pytest.raises(SystemExit) as exit:
        report.main(["run", "--out", "new"])
    assert exit.value.code == 74
    assert capfd.readouterr().err == "error: new/index.html: cannot be written (Is a directory)\n"
    assert not any(path.name.startswith(".") for path in Path("new").iterdir())
