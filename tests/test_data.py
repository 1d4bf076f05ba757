"""Data: every file format and what can be wrong with it, batches that resume, augmentation, label noise."""

from __future__ import annotations

import builtins
import gzip
import lzma
import pickle
import struct
from collections import OrderedDict

import numpy as np
import pytest
import torch

from sparsekern import data
from sparsekern.data import ArraySplit, Augment, Batches, DataError
from sparsekern.data.noise import ASYMMETRIC
from sparsekern.data.unpickle import safe_unpickle

SUFFIXES = ["", ".gz", ".xz"]
FIXED_SEED = np.random.default_rng(0)


def write(path, content, suffix=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = {"": lambda b: b, ".gz": gzip.compress, ".xz": lzma.compress}[suffix](content)
    target = path.with_name(path.name + suffix)
    target.write_bytes(packed)
    return target


def idx(array):
    return struct.pack(f">I{array.ndim}I", 0x800 | array.ndim, *array.shape) + array.tobytes()


def grey(n, rng=FIXED_SEED):
    return rng.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n, dtype=np.uint8) % 10


def write_mnist(folder, n=20, suffix="", splits=("train", "t10k")):
    made = {}
    for split in splits:
        made[split] = images, labels = grey(n)
        write(folder / f"{split}-images-idx3-ubyte", idx(images), suffix)
        write(folder / f"{split}-labels-idx1-ubyte", idx(labels), suffix)
    return made


def colour(n, classes=10):
    return FIXED_SEED.integers(0, 256, (n, 3072), np.uint8), np.arange(n, dtype=np.uint8) % classes


def write_cifar10(folder, n=10, suffix="", kind="bin"):
    """Five batches and a test batch; returns what they hold as (pixels [N, 3072], labels)."""
    made = {}
    for split, files in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"])):
        parts = [colour(n) for _ in files]
        for name, (pixels, labels) in zip(files, parts):
            if kind == "bin":
                write(folder / f"{name}.bin", np.hstack([labels[:, None], pixels]).tobytes(), suffix)
            else:
                batch = {b"data": pixels, b"labels": labels.tolist(), b"filenames": [b"x.png"] * n}
                write(folder / name, pickle.dumps(batch, protocol=2 if name.endswith("1") else 5), suffix)
        made[split] = np.concatenate([p for p, _ in parts]), np.concatenate([y for _, y in parts])
    return made


def same(split, pixels, labels):
    assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
    assert torch.equal(split.images, torch.from_numpy(pixels).view(split.images.shape))
    assert split.labels.tolist() == labels.tolist()


@pytest.fixture(autouse=True)
def no_data_variable(monkeypatch, request):
    if "data_dir" not in request.fixturenames:
        monkeypatch.delenv("SPARSEKERN_DATA", raising=False)


# -- sources ----------------------------------------------------------------------------------------------------------


def test_digits():
    bundle = data.load()
    assert (len(bundle.train), len(bundle.test)) == (1437, 360)
    assert bundle.in_shape == (1, 8, 8) and bundle.num_classes == 10
    assert float(bundle.train.images.max()) == 1.0 and bundle.train.images.dtype == torch.float32
    assert torch.bincount(bundle.test.labels).tolist() == pytest.approx([36] * 10, abs=1)
    assert torch.equal(data.load("digits", seed=5).test.images, bundle.test.images)  # the test set never moves
    everything = torch.cat([bundle.train.images, bundle.test.images])
    assert float(everything.mean()) == pytest.approx(bundle.mean[0], abs=1e-4)
    assert float(everything.std()) == pytest.approx(bundle.std[0], abs=1e-4)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "mnist"), ("fashion-mnist", "FashionMNIST/raw"), ("mnist", ".")]
)
def test_idx(tmp_path, name, folder, suffix):
    made = write_mnist(tmp_path / folder, suffix=suffix)
    bundle = data.load(name, tmp_path)
    same(bundle.train, *made["train"])
    same(bundle.test, *made["t10k"])
    assert bundle.in_shape == (1, 28, 28) and len(bundle.class_names) == 10


def test_idx_names_with_a_dot(tmp_path):
    images, labels = grey(4)
    write(tmp_path / "t10k-images.idx3-ubyte", idx(images))
    write(tmp_path / "t10k-labels.idx1-ubyte", idx(labels))
    same(data.load("mnist", tmp_path, splits="test").test, images, labels)


def test_folder_from_the_environment(tmp_path, monkeypatch):
    write_mnist(tmp_path / "mnist")
    monkeypatch.setenv("SPARSEKERN_DATA", str(tmp_path))
    assert len(data.load("mnist").train) == 20


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["bin", "python"])
def test_cifar10(tmp_path, kind, suffix):
    folder = tmp_path / ("cifar-10-batches-bin" if kind == "bin" else "cifar-10-batches-py")
    made = write_cifar10(folder, suffix=suffix, kind=kind)
    for root in (tmp_path, folder):
        bundle = data.load("cifar10", root)
        same(bundle.train, *made["train"])
        same(bundle.test, *made["test"])
        assert bundle.in_shape == (3, 32, 32) and bundle.class_names[8] == "ship"


def test_cifar10_class_names_of_the_files(tmp_path):
    names = [f"name{i}" for i in range(10)]
    write_cifar10(tmp_path)
    write(tmp_path / "batches.meta.txt", "\n".join(names).encode())
    assert data.load("cifar10", tmp_path).class_names == tuple(names)
    (tmp_path / "batches.meta.txt").unlink()
    write(tmp_path / "batches.meta", pickle.dumps({"label_names": names}))
    assert data.load("cifar10", tmp_path).class_names == tuple(names)


@pytest.mark.parametrize("kind", ["bin", "python", "npz"])
def test_cifar100_takes_fine_labels(tmp_path, kind):
    pixels, fine = colour(200, 100)
    coarse = fine // 5
    if kind == "bin":
        write(tmp_path / "test.bin", np.hstack([coarse[:, None], fine[:, None], pixels]).tobytes(), ".xz")
    elif kind == "python":
        batch = {b"data": pixels, b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist()}
        write(tmp_path / "test", pickle.dumps(batch, protocol=2), ".gz")
    else:
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        names = np.array([f"class{i}" for i in range(100)])
        np.savez_compressed(tmp_path / "subset.npz", test_images=images, test_labels=fine, class_names=names)
    bundle = data.load("cifar100", tmp_path, splits="test")
    same(bundle.test, pixels, fine)
    assert bundle.num_classes == 100
    assert (bundle.class_names[3] == "class3") == (kind == "npz")


def test_aliases_and_names(tmp_path):
    write_cifar10(tmp_path / "cifar10")
    assert data.load("CIFAR-10", tmp_path).name == "cifar10"
    assert {"digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "imagefolder"} == set(data.names())


def one_line(error):
    assert "\n" not in str(error.value) and "expected" in str(error.value)


@pytest.mark.parametrize(
    ("name", "what"),
    [("cifra10", "did you mean 'cifar10'"), ("zzz", "choose one of them"), ("mnist", "got none; pass")],
)
def test_unknown_or_no_folder(name, what):
    with pytest.raises(DataError, match=what) as error:
        data.load(name)
    one_line(error)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"found nothing; check data_dir") as error:
        data.load("mnist", tmp_path / "absent")
    one_line(error)
    write_mnist(tmp_path / "mnist", splits=("t10k",))
    with pytest.raises(
        DataError, match=r"mnist train: .*train-images.*holds t10k-images.*or load only the splits"
    ) as error:
        data.load("mnist", tmp_path)
    one_line(error)
    with pytest.raises(DataError, match=r"cifar10 train: expected data_batch_1.bin, .*found none.*holds mnist"):
        data.load("cifar10", tmp_path)
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"found all but data_batch_3.bin; add"):
        data.load("cifar10", tmp_path)
    with pytest.raises(DataError, match=r"found a file"):
        data.load("cifar10", tmp_path / "test_batch.bin")


def test_another_sets_folder_is_not_taken(tmp_path):
    write_mnist(tmp_path / "fashion-mnist")
    write_mnist(tmp_path / "FashionMNIST" / "raw")
    for folder in ("fashion-mnist", "FashionMNIST/raw"):
        with pytest.raises(DataError, match="named like another set"):
            data.load("mnist", tmp_path / folder)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda b: b[:-1], "bytes after the header"),
        (lambda b: b + b"\0", "bytes after the header"),
        (lambda b: b[:10], "magic number"),
        (lambda b: b"", "magic number"),
        (lambda b: b"\0\0\x08\x01" + b[4:], "magic number 0x00000803, found 0x00000801"),
    ],
)
def test_broken_idx(tmp_path, change, what):
    made = write_mnist(tmp_path)
    write(tmp_path / "train-images-idx3-ubyte", change(idx(made["train"][0])))
    with pytest.raises(DataError, match=what) as error:
        data.load("mnist", tmp_path)
    one_line(error)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda b: b[: len(b) // 2], "truncated"),
        (lambda b: b[:-4], "truncated"),
        (lambda b: b"not compressed at all", "corrupt"),
        (lambda b: b[: len(b) // 2] + bytes(64) + b[len(b) // 2 + 64 :], "corrupt"),
    ],
)
def test_broken_compression(tmp_path, suffix, change, what):
    write_cifar10(tmp_path, suffix=suffix)
    path = tmp_path / f"data_batch_2.bin{suffix}"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=what) as error:
        data.load("cifar10", tmp_path)
    assert str(path) in str(error.value)
    one_line(error)


def test_sizes_and_labels_are_checked(tmp_path):
    write_cifar10(tmp_path)
    path = tmp_path / "data_batch_1.bin"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(DataError, match="records of 3073 bytes"):
        data.load("cifar10", tmp_path)
    path.write_bytes(b"\x0a" + good[1:])
    with pytest.raises(DataError, match=r"labels within 0..9, found 0..10"):
        data.load("cifar10", tmp_path)
    write_mnist(tmp_path / "mnist")
    write(tmp_path / "mnist" / "train-labels-idx1-ubyte", idx(np.zeros(19, np.uint8)))
    with pytest.raises(DataError, match="one label for each of 20 images"):
        data.load("mnist", tmp_path)


def test_broken_npz(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(DataError, match="expected an npz"):
        data.load("cifar100", tmp_path, splits="test")
    np.savez(tmp_path / "a.npz", test_images=np.zeros((2, 3, 32, 32), np.uint8), test_labels=np.zeros(2, int))
    with pytest.raises(DataError, match=r"uint8 images \[N, 32, 32, 3\]"):
        data.load("cifar100", tmp_path, splits="test")
    np.savez(tmp_path / "a.npz", test_images=np.array([object()]), test_labels=np.zeros(1, int))
    with pytest.raises(DataError, match="expected an npz"):
        data.load("cifar100", tmp_path, splits="test")


# -- pickles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i4", "f4", "?"])
def test_safe_unpickle_gives_what_pickle_gives(protocol, dtype):
    value = {
        b"data": np.arange(12).reshape(3, 4).astype(dtype),
        b"fortran": np.asfortranarray(np.arange(6).reshape(2, 3).astype(dtype)),
        b"labels": [1, 2, 3],
        b"pair": (1.5, None),
        b"empty": b"",
    }
    found = safe_unpickle(pickle.dumps(value, protocol=protocol))
    assert list(found) == list(value)
    for key in (b"data", b"fortran"):
        np.testing.assert_array_equal(found[key], value[key])
        assert found[key].dtype == value[key].dtype
    assert {k: found[k] for k in (b"labels", b"pair", b"empty")} == {
        k: value[k] for k in (b"labels", b"pair", b"empty")
    }


class Call:
    """Pickles as a call of ``function(*args)``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickled_code_does_not_run(tmp_path, protocol):
    marker = tmp_path / "ran"
    evil = Call(builtins.exec, f"open({str(marker)!r}, 'w').close()")
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, kind="python")
    write(folder / "data_batch_4", pickle.dumps({b"data": evil}, protocol=protocol))
    with pytest.raises(DataError, match=r"data_batch_4: .*found the name .*exec.*nothing in it was run") as error:
        data.load("cifar10", tmp_path)
    one_line(error)
    assert not marker.exists()
    pickle.loads(pickle.dumps(evil, protocol=protocol))  # the pickle is a working attack
    assert marker.exists()


@pytest.mark.parametrize(
    "value",
    [
        OrderedDict(a=1),
        np.array([object()], dtype=object),
        np.float64(1),
        {1, 2},
        Call(np.frombuffer, b"abc"),
        Call(getattr, "a", "upper"),
        Call(np.ndarray, (1,), np.dtype("u1")),
        np.dtype("u1"),
        np.ndarray,
        np.array(["text"]),
    ],
    ids=lambda v: type(v).__name__,
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_other_objects_are_refused(value, protocol):
    with pytest.raises(pickle.UnpicklingError):
        safe_unpickle(pickle.dumps({b"data": value}, protocol=protocol))


def test_broken_pickles_are_refused():
    whole = pickle.dumps({b"data": np.arange(100)}, protocol=2)
    for content in (b"", b"garbage", whole[: len(whole) // 2], whole[:-1], whole.replace(b"i8", b"i4")):
        with pytest.raises(pickle.UnpicklingError):
            safe_unpickle(content)


def test_python_batch_contents_are_checked(tmp_path):
    write_cifar10(tmp_path, kind="python")
    pixels, labels = colour(10)
    for batch, what in (
        ([1, 2], "found NoneType"),
        ({b"data": pixels.astype(np.int64), b"labels": labels.tolist()}, r"uint8 \[N, 3072\], found int64"),
        ({b"data": pixels, b"fine_labels": labels.tolist()}, "expected labels as a list"),
        ({b"data": pixels, b"labels": ["a"] * 10}, "expected labels as a list"),
        ({b"data": pixels, b"labels": [0] * 9}, "one label for each"),
    ):
        write(tmp_path / "test_batch", pickle.dumps(batch))
        with pytest.raises(DataError, match=what):
            data.load("cifar10", tmp_path, splits="test")


# -- image folders ----------------------------------------------------------------------------------------------------


@pytest.fixture
def image_root(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 6), ("val", 3)):
        for c, name in enumerate(("ant", "bee")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.full((40 + i, 60, 3), 100 * c, np.uint8)
                pixels[:, :30, 0] = 200  # left half red
                image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    return tmp_path


def test_image_folder(image_root):
    bundle = data.load("imagefolder", image_root, image_size=16)
    assert bundle.class_names == ("ant", "bee") and bundle.num_classes == 2 and bundle.in_shape == (3, 16, 16)
    assert (len(bundle.train), len(bundle.test)) == (12, 6)
    assert bundle.train.labels.tolist() == [0] * 6 + [1] * 6
    pixels, label = bundle.test[3]
    assert label == 1 and pixels.dtype == torch.uint8
    assert pixels[0, :, 0].tolist() == [200] * 16 and pixels[0, :, -1].tolist() == [100] * 16
    assert len(torch.utils.data.DataLoader(bundle.test, batch_size=4)) == 2


def test_image_folder_batches(image_root):
    bundle = data.load("imagefolder", image_root, image_size=16, val=4)
    assert len(bundle.val) == 4
    a, b = (list(bundle.batches("train", 4, seed=3)) for _ in range(2))
    assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b))
    plain = bundle.train.fetch(torch.arange(8))
    crops = bundle.train.fetch(torch.arange(8), Augment(padding=0), torch.Generator().manual_seed(0))
    assert crops.shape == plain.shape and not torch.equal(crops, plain)
    flipped = sum(int(c[0, 0, 0]) < int(c[0, 0, -1]) for c in crops)
    assert 0 < flipped < 8


def test_broken_image_folders(image_root, tmp_path):
    with pytest.raises(DataError, match="one folder per class"):
        data.load("imagefolder", image_root / "train", image_size=16)
    with pytest.raises(DataError, match="hold out part of train"):
        data.load("imagefolder", image_root, splits=("val",))
    bundle = data.load("imagefolder", image_root, image_size=16)
    (image_root / "val" / "bee" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1.png: expected a readable image"):
        list(bundle.batches("test", 6))
    (image_root / "val" / "cat").mkdir()
    with pytest.raises(DataError, match="others such as cat"):
        data.load("imagefolder", image_root)
    for file in (image_root / "train").glob("*/*"):
        file.unlink()
    with pytest.raises(DataError, match="at least one sample"):
        data.load("imagefolder", image_root, splits="train")


# -- splits -----------------------------------------------------------------------------------------------------------


def numbered(n=100, classes=10, shape=(3, 8, 8)):
    """Image i holds its own number in every pixel."""
    images = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, *shape).contiguous() / n
    return ArraySplit(images, torch.arange(n) % classes, classes)


def members(split, n=100):
    return (split.images[:, 0, 0, 0] * n).round().to(torch.int64)


def test_validation_split(tmp_path):
    write_cifar10(tmp_path, n=40)
    full = data.load("cifar10", tmp_path)
    a = data.load("cifar10", tmp_path, val=50)
    b = data.load("cifar10", tmp_path, val=0.25)
    other = data.load("cifar10", tmp_path, val=50, seed=1)
    assert (len(a.train), len(a.val), len(a.test)) == (150, 50, 40) and len(b.val) == 50
    assert torch.equal(a.val.images, b.val.images) and not torch.equal(a.val.images, other.val.images)
    together = torch.cat([a.train.images, a.val.images]).flatten(1)
    assert {bytes(r) for r in together.numpy()} == {bytes(r) for r in full.train.images.flatten(1).numpy()}
    assert "val" in a and "val" not in full
    with pytest.raises(DataError, match="load it with val="):
        _ = full.val
    for val in (200, 1.5, 0.001, 1e9):
        with pytest.raises(DataError, match="val"):
            data.load("cifar10", tmp_path, val=val)


@pytest.mark.parametrize("options", [{"splits": ("valid",)}, {"splits": ()}, {"splits": "test", "val": 5}])
def test_bad_splits(options):
    with pytest.raises(DataError, match="split"):
        data.load("digits", **options)


def test_subsets():
    bundle = data.load("digits", subset=100)
    counts = torch.bincount(bundle.train.labels)
    full = torch.bincount(data.load("digits").train.labels) * 100 / 1437
    assert int(counts.sum()) == 100 and float((counts - full).abs().max()) < 1
    first = data.load("digits", subset=7, subset_how="first").train
    assert torch.equal(first.images, data.load("digits").train.images[:7])
    both = data.load("digits", subset={"train": 0.5, "test": 36}, subset_how="random")
    assert (len(both.train), len(both.test)) == (718, 36)
    assert torch.equal(both.test.images, data.load("digits", subset={"test": 36}, subset_how="random").test.images)
    with pytest.raises(DataError, match=r"within 1\.\.1437"):
        data.load("digits", subset=1438)
    with pytest.raises(DataError, match="first, random or stratified"):
        data.load("digits", subset=10, subset_how="last")


def test_stratified_subset_keeps_order_and_shares():
    split = numbered(100, classes=7)
    part = split.subset(50, seed=3)
    chosen = members(part)
    assert bool((chosen.diff() > 0).all()) and torch.equal(part.labels, chosen % 7)
    assert torch.bincount(part.labels).tolist() == pytest.approx([50 / 7] * 7, abs=1)


def test_split_is_a_dataset():
    split = numbered(10)
    image, label = split[3]
    assert image.shape == (3, 8, 8) and label == 3 and split[-1][1] == 9
    assert sum(len(y) for _, y in torch.utils.data.DataLoader(split, batch_size=4)) == 10
    with pytest.raises(IndexError):
        split[10]


def test_array_split_checks():
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    for bad, labels, what in (
        (images[:, 0], torch.zeros(4), r"images \[N, C, H, W\]"),
        (images.to(torch.int64), torch.zeros(4), "uint8 or float32"),
        (images, torch.zeros(3, dtype=torch.int64), "one label for each"),
        (images, torch.tensor([0, 1, 2, -1]), "labels within"),
        (images[:0], torch.zeros(0, dtype=torch.int64), "at least one sample"),
    ):
        with pytest.raises(DataError, match=what):
            ArraySplit(bad, labels, 3)


def test_to_shape_pads_and_repeats():
    split = ArraySplit(torch.full((2, 1, 28, 28), 9, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), 10)
    big = split.to_shape((3, 32, 32))
    assert big.in_shape == (3, 32, 32) and big.images.dtype == torch.uint8
    assert bool((big.images[:, :, 2:30, 2:30] == 9).all()) and int((big.images != 0).sum()) == 2 * 3 * 28 * 28
    with pytest.raises(DataError, match="padded to"):
        big.to_shape((1, 32, 32))


# -- batches ----------------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_sample_once():
    split = numbered()
    for drop_last, count in ((False, 4), (True, 3)):
        batches = Batches(split, 30, shuffle=True, drop_last=drop_last)
        for _ in range(2):
            seen = list(batches)
            assert len(seen) == len(batches) == count
            numbers = torch.cat([(x[:, 0, 0, 0] * 100).round().long() for x, _ in seen])
            assert len(set(numbers.tolist())) == len(numbers) == (100 if count == 4 else 90)
            assert torch.equal(torch.cat([y for _, y in seen]), numbers % 10)
    assert batches.epoch == 2


def test_order_follows_the_seed_alone():
    def epochs(seed):
        batches = Batches(numbered(), 32, shuffle=True, augment=Augment(2), seed=seed)
        torch.rand(seed + 1)  # the global generator does not matter
        return [torch.cat([y for _, y in batches]) for _ in range(2)]

    a, b, c = epochs(0), epochs(0), epochs(1)
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(a[0], c[0]) and not torch.equal(a[0], a[1])


def test_unshuffled_is_in_order():
    labels = torch.cat([y for _, y in Batches(numbered(), 32)])
    assert torch.equal(labels, torch.arange(100) % 10)


@pytest.mark.parametrize("stop", range(1, 13))
@pytest.mark.parametrize("shuffle", [True, False])
def test_resume_in_the_middle_is_bit_exact(stop, shuffle):
    def make(seed=7):
        return Batches(numbered(), 30, shuffle=shuffle, augment=Augment(2), seed=seed)

    def forever(batches):
        while batches.epoch < 3:
            yield from batches

    whole = list(forever(make()))
    assert len(whole) == 12
    batches = make()
    for i, _ in enumerate(forever(batches), 1):
        if i == stop:
            state = pickle.loads(pickle.dumps(batches.state_dict()))
            break
    resumed = make(seed=99)
    resumed.load_state_dict(state)
    assert resumed.state_dict().keys() == state.keys() and resumed.epoch == (stop - 1) // 4
    rest = list(forever(resumed))
    assert len(rest) == 12 - stop
    assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(whole[stop:], rest))


def test_resume_between_epochs():
    first = Batches(numbered(), 30, shuffle=True)
    list(first)
    state = first.state_dict()
    second = Batches(numbered(), 30, shuffle=True, seed=5)
    second.load_state_dict(state)
    assert second.epoch == 1
    assert all(torch.equal(y, v) for (_, y), (_, v) in zip(first, second, strict=True))


def test_state_survives_torch_save(tmp_path):
    batches = Batches(numbered(), 30, shuffle=True)
    next(iter(batches))
    torch.save(batches.state_dict(), tmp_path / "state.pt")
    other = Batches(numbered(), 30, shuffle=True)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.position == 1


def test_an_epoch_left_early_is_over():
    batches = Batches(numbered(), 30)
    for expected in (0, 1, 2):
        _, y = next(iter(batches))
        assert y[0] == 0 and batches.epoch == expected


def test_state_of_other_data_is_refused():
    state = Batches(numbered(), 30, shuffle=True).state_dict()
    for other in (
        Batches(numbered(90), 30, shuffle=True),
        Batches(numbered(), 20, shuffle=True),
        Batches(numbered(), 30),
    ):
        with pytest.raises(ValueError, match="resume with the data and batch size"):
            other.load_state_dict(state)


def test_two_loops_at_once_are_refused():
    batches = Batches(numbered(), 30)
    outer = iter(batches)
    next(outer)
    next(iter(batches))
    with pytest.raises(RuntimeError, match="one loop at a time"):
        next(outer)


def test_normalisation():
    images = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    split = ArraySplit(images, torch.zeros(50, dtype=torch.int64), 2)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    x, _ = next(iter(Batches(split, 50, mean=mean, std=std)))
    m, s = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
    torch.testing.assert_close(x, ((images.double() / 255 - m) / s).float(), rtol=1e-6, atol=1e-6)
    half, _ = next(iter(Batches(split, 50, dtype=torch.bfloat16, channels_last=True)))
    assert half.dtype == torch.bfloat16 and half.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(split.images, images)


def test_iterating_leaves_float_images_alone():
    split = numbered()
    before = split.images.clone()
    for _ in Batches(split, 25, mean=(0.5,), std=(0.1,)):
        pass
    assert torch.equal(split.images, before)


def test_bundle_batches_choose_by_split(tmp_path):
    write_cifar10(tmp_path)
    bundle = data.load("cifar10", tmp_path)
    train, test = bundle.batches("train", 10), bundle.batches("test", 10)
    assert train.shuffle and train.augment == Augment() and not test.shuffle and test.augment is None
    assert bundle.batches("train", 10, augment=None).augment is None
    assert "train 50" in str(bundle)
    with pytest.raises(DataError, match="one of the loaded splits"):
        bundle.batches("val", 10)


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"mean": (0.0, 0.0)}, {"std": (0.0,)}, {"batch_size": 101, "drop_last": True}]
)
def test_bad_batch_arguments(options):
    with pytest.raises(ValueError, match=r"batch_size|mean"):
        Batches(numbered(), **{"batch_size": 10, **options})


# -- augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["reflect", "zero"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_every_crop_is_a_window_of_the_padded_image(mode, dtype):
    images = torch.randint(1, 256, (64, 2, 6, 7)).to(dtype)
    out = Augment(2, mode, flip=True)(images, torch.Generator().manual_seed(0))
    assert out.shape == images.shape and out.dtype == dtype
    pad_mode = "reflect" if mode == "reflect" else "constant"
    padded = torch.nn.functional.pad(images.float(), (2,) * 4, mode=pad_mode)
    places = set()
    for i in range(64):
        windows = {
            (dy, dx, flip): torch.flip(padded[i, :, dy : dy + 6, dx : dx + 7], [2] if flip else [])
            for dy in range(5)
            for dx in range(5)
            for flip in (False, True)
        }
        found = [place for place, window in windows.items() if torch.equal(window, out[i].float())]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 25


def test_augmentation_statistics():
    ramp = torch.arange(81.0).view(1, 1, 9, 9).expand(20_000, 1, 9, 9)
    out = Augment(4, "reflect")(ramp, torch.Generator().manual_seed(1))
    centre = out[:, 0, 4, 4].long()
    row, column = centre // 9, centre % 9
    for position in (row, column):  # the centre shows every position equally often: sd of a share is 0.0022
        assert (torch.bincount(position, minlength=9) / 20_000).tolist() == pytest.approx([1 / 9] * 9, abs=0.011)
    middle = torch.arange(20_000.0).view(-1, 1, 1, 1) + torch.tensor([0.0, 0.25, 0.5]).view(1, 1, 1, 3)
    flipped = Augment(0)(middle, torch.Generator().manual_seed(1))[:, 0, 0, 0] % 1 == 0.5
    assert float(flipped.float().mean()) == pytest.approx(0.5, abs=0.02)


def test_augmentation_switched_off():
    images = torch.randint(0, 256, (8, 3, 6, 6), dtype=torch.uint8)
    assert torch.equal(Augment(0, flip=False)(images), images)
    with pytest.raises(DataError, match="padding below 6"):
        Augment(6)(images)
    assert Augment(6, "zero")(images).shape == images.shape
    for bad in ({"padding": -1}, {"mode": "edge"}):
        with pytest.raises(DataError, match="augment"):
            Augment(**bad)


# -- label noise ------------------------------------------------------------------------------------------------------

LABELS = torch.arange(1000) % 10


@pytest.mark.parametrize("rate", [0.0, 0.07, 0.2, 0.333, 1.0])
@pytest.mark.parametrize("kind", ["symmetric", "symmetric-true"])
def test_symmetric_noise_counts(kind, rate):
    noise = data.add_label_noise(LABELS, rate, kind, 10)
    expected = {0.0: 0, 0.07: 70, 0.2: 200, 0.333: 333, 1.0: 1000}[rate]
    assert len(noise.picked) == expected == len(set(noise.picked.tolist()))
    assert torch.equal(noise.changed, (noise.labels != LABELS).nonzero().flatten())
    assert set(noise.changed.tolist()) <= set(noise.picked.tolist())
    if kind == "symmetric-true":
        assert torch.equal(noise.changed, noise.picked)
    assert int(noise.labels.min()) >= 0 and int(noise.labels.max()) <= 9
    assert torch.equal(LABELS, torch.arange(1000) % 10)


def test_symmetric_noise_is_uniform():
    labels = torch.zeros(50_000, dtype=torch.int64)
    drawn = data.add_label_noise(labels, 1.0, "symmetric", 10).labels
    assert (torch.bincount(drawn, minlength=10) / 50_000).tolist() == pytest.approx([0.1] * 10, abs=0.007)
    drawn = data.add_label_noise(labels, 1.0, "symmetric-true", 10).labels
    assert (torch.bincount(drawn, minlength=10) / 50_000).tolist() == pytest.approx([0] + [1 / 9] * 9, abs=0.007)


def test_count_is_rounded_up():
    assert len(data.add_label_noise(LABELS[:101], 0.1, "symmetric", 10).picked) == 11


def test_pairflip():
    noise = data.add_label_noise(LABELS, 0.25, "pairflip", 10)
    assert torch.bincount(LABELS[noise.picked]).tolist() == [25] * 10
    assert torch.equal(noise.labels[noise.picked], (LABELS[noise.picked] + 1) % 10)


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_asymmetric(name):
    mapping = ASYMMETRIC[name]
    noise = data.add_label_noise(LABELS, 0.4, "asymmetric", 10, mapping=mapping)
    assert set(LABELS[noise.picked].tolist()) == set(mapping)
    assert len(noise.picked) == 40 * len(mapping)
    assert noise.labels[noise.picked].tolist() == [mapping[int(c)] for c in LABELS[noise.picked]]


def test_noise_follows_the_seed():
    a, b, c = (data.add_label_noise(LABELS, 0.3, seed=s) for s in (1, 1, 2))
    assert torch.equal(a.labels, b.labels) and not torch.equal(a.labels, c.labels)


@pytest.mark.parametrize(
    ("rate", "kind", "mapping"),
    [
        (1.1, "symmetric", None),
        (-0.1, "symmetric", None),
        (0.1, "gaussian", None),
        (0.1, "asymmetric", None),
        (0.1, "asymmetric", {1: 10}),
    ],
)
def test_bad_noise(rate, kind, mapping):
    with pytest.raises(DataError, match="label noise: expected"):
        data.add_label_noise(LABELS, rate, kind, 10, mapping=mapping)


def test_loading_with_noise(tmp_path):
    write_cifar10(tmp_path, n=40)
    bundle = data.load("cifar10", tmp_path, val=50, label_noise=0.4, noise_kind="asymmetric")
    clean = data.load("cifar10", tmp_path, val=50)
    train = bundle.train
    assert torch.equal(train.clean_labels, clean.train.labels) and torch.equal(bundle.val.labels, clean.val.labels)
    assert torch.equal((train.labels != train.clean_labels).nonzero().flatten(), train.noisy)
    part = train.select([int(train.noisy[0]), 0])
    assert 0 in part.noisy.tolist() and part.clean_labels[0] == train.clean_labels[train.noisy[0]]
    assert bundle.test.noisy is None
    with pytest.raises(DataError, match="train split for label noise"):
        data.load("cifar10", tmp_path, splits="test", label_noise=0.1)
    with pytest.raises(DataError, match="mapping"):
        data.load("digits", label_noise=0.1, noise_kind="asymmetric")


# -- real files -------------------------------------------------------------------------------------------------------


def test_real_grey_sets(data_dir):
    if not (data_dir / "fashion-mnist").is_dir():
        pytest.skip("no fashion-mnist in SPARSEKERN_DATA")
    bundle = data.load("fashion-mnist", data_dir)
    assert (len(bundle.train), len(bundle.test)) == (60_000, 10_000)
    assert torch.bincount(bundle.train.labels).tolist() == [6000] * 10
    pixels = bundle.train.images.to(torch.float32) / 255
    assert float(pixels.mean()) == pytest.approx(bundle.mean[0], abs=1e-4)
    assert float(pixels.std()) == pytest.approx(bundle.std[0], abs=1e-4)


def test_real_colour_sets(data_dir):
    if not (data_dir / "cifar-10-batches-bin").is_dir():
        pytest.skip("no cifar-10-batches-bin in SPARSEKERN_DATA")
    test = data.load("cifar10", data_dir, splits="test")
    assert torch.bincount(test.test.labels).tolist() == [1000] * 10
    # The test images have nearly the statistics of the training images.
    pixels = test.test.images.to(torch.float32) / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(test.mean, abs=5e-3)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(test.std, abs=5e-3)
