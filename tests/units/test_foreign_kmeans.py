import gzip
import io
import lzma
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import cluster

from hubert_lightning.units import foreign_kmeans
from hubert_lightning.units.kmeans import assign
from hubert_lightning.units.kmeans_file import load_kmeans, save_kmeans
from hubert_lightning.units.label_recipe import LabelRecipe


def rows(seed: int, count: int = 500) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def fitted() -> cluster.MiniBatchKMeans:
    kmeans = cluster.MiniBatchKMeans(10, n_init=1, random_state=np.random.RandomState(3)).fit(rows(0))
    kmeans.random_state_ = np.random.RandomState(1)  # as scikit-learn kept it before 0.24
    return kmeans


def dumped(kmeans: object, **options: Any) -> bytes:
    file = io.BytesIO()
    joblib.dump(kmeans, file, **options)
    return file.getvalue()


def opened(folder: Path, content: bytes) -> tuple[np.ndarray, dict[str, str]]:
    path = folder / "somebodys"
    path.write_bytes(content)
    [centroids], source = load_kmeans(path)
    assert centroids.dtype == torch.float32
    return centroids.numpy(), source


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("compress", [0, *((name, 3) for name in ("zlib", "gzip", "bz2", "xz", "lzma"))], ids=str)
def test_what_joblib_dumped_has_the_centroids_of_scikit_learn(
    fitted: cluster.MiniBatchKMeans, tmp_path: Path, compress: object, protocol: int
) -> None:
    centroids, source = opened(tmp_path, dumped(fitted, compress=compress, protocol=protocol))
    np.testing.assert_array_equal(centroids, fitted.cluster_centers_)
    assert source["imported"] == "scikit-learn MiniBatchKMeans"
    assert (source["file"], len(source["sha256"])) == ("somebodys", 64)


@pytest.mark.parametrize("protocol", range(6))
def test_what_pickle_dumped_has_the_centroids_of_scikit_learn(tmp_path: Path, protocol: int) -> None:
    kmeans = cluster.KMeans(10, n_init=1, random_state=0).fit(rows(0).astype(np.float64))
    centroids, source = opened(tmp_path, pickle.dumps(kmeans, protocol=protocol))
    np.testing.assert_array_equal(centroids, kmeans.cluster_centers_.astype(np.float32))
    assert source["imported"] == "scikit-learn KMeans"


@pytest.mark.parametrize("dump", [dumped, pickle.dumps], ids=["joblib", "pickle"])
def test_what_was_dumped_years_ago_opens(
    fitted: cluster.MiniBatchKMeans, tmp_path: Path, dump: Callable[..., bytes]
) -> None:
    content = dump(fitted, protocol=3)  # whose names are lines of text
    for name, before in (
        (b"csklearn.cluster._kmeans\n", b"csklearn.cluster.k_means_\n"),
        (b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"),
        (b"cjoblib.numpy_pickle\n", b"csklearn.externals.joblib.numpy_pickle\n"),
        (b"cnumpy.random._pickle\n__randomstate_ctor\n", b"cnumpy.random\n__RandomState_ctor\n"),
    ):
        content = content.replace(name, before)
    np.testing.assert_array_equal(opened(tmp_path, content)[0], fitted.cluster_centers_)


def test_we_assign_what_scikit_learn_predicts(fitted: cluster.MiniBatchKMeans, tmp_path: Path) -> None:
    centroids, _ = opened(tmp_path, dumped(fitted))
    features = rows(7, 5000)
    nearest = np.sort(fitted.transform(features), axis=1)
    clear = nearest[:, 1] - nearest[:, 0] > 1e-4  # of two that are as near, either may be chosen
    ours = assign(torch.from_numpy(features), torch.from_numpy(centroids)).numpy()
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(ours[clear], fitted.predict(features)[clear])


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_of_numpy_is_centroids(tmp_path: Path, dtype: str, order: str) -> None:
    array, file = np.asarray(rows(0, 10).astype(dtype), order=order), io.BytesIO()
    np.save(file, array)
    for content in (file.getvalue(), dumped(with_centres(array)), pickle.dumps(with_centres(array))):
        np.testing.assert_array_equal(opened(tmp_path, content)[0], array.astype(np.float32))


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("centres", [torch.from_numpy, np.asarray], ids=["tensor", "array"])
def test_a_torch_file_with_cluster_centers_is_centroids(
    tmp_path: Path, centres: Callable[[np.ndarray], Any], protocol: int
) -> None:
    content = {"n_features_in_": 8, "cluster_centers_": centres(rows(0, 10))}
    centroids, source = opened(tmp_path, in_torch(content, pickle_protocol=protocol))
    np.testing.assert_array_equal(centroids, rows(0, 10))
    assert source["imported"] == "torch file"


def with_centres(array: Any) -> cluster.KMeans:
    kmeans = cluster.KMeans(10)
    kmeans.cluster_centers_ = array
    return kmeans


def in_torch(content: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


class Opening:
    """Writes a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "it ran")


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_in_a_pickle_runs(fitted: cluster.MiniBatchKMeans, tmp_path: Path, protocol: int) -> None:
    ran = tmp_path / "ran"
    kmeans = with_centres(fitted.cluster_centers_)
    kmeans.more = Opening(ran)
    objects = with_centres(np.array([[Opening(ran)]], dtype=object))
    contents = [pickle.dumps(kmeans, protocol=protocol), pickle.dumps(objects, protocol=protocol)]
    if protocol >= 2:
        contents += [dumped(kmeans, protocol=protocol), dumped(objects, protocol=protocol)]
    for content in contents:
        with pytest.raises(
            ValueError, match=r"somebodys: (asks for .* which may run anything|holds an array of Python)"
        ):
            opened(tmp_path, content)
    assert not ran.exists()
    pickle.loads(contents[0])  # which is no empty threat
    assert ran.exists()


@pytest.mark.parametrize(
    "named", ["builtins\neval", "os\nsystem", "numpy\nload", "sklearn.cluster._kmeans\nKMeans.fit", "joblib\nload"]
)
def test_a_name_that_is_not_on_the_list_is_refused_by_name(tmp_path: Path, named: str) -> None:
    with pytest.raises(ValueError, match=f"asks for {named.replace(chr(10), '.')} while it is opened"):
        opened(tmp_path, f"c{named}\n(S'1'\ntR.".encode())


def test_a_stand_in_cannot_be_changed_by_a_pickle(tmp_path: Path) -> None:
    before = dict(vars(foreign_kmeans.KMeansStandIn))
    with pytest.raises(ValueError, match="sets the state of a type"):
        opened(tmp_path, b"\x80\x02csklearn.cluster._kmeans\nKMeans\nN}X\x05\x00\x00\x00stateK\x01s\x86b.")
    assert dict(vars(foreign_kmeans.KMeansStandIn)) == before


def test_python_objects_in_arrays_are_refused(tmp_path: Path) -> None:
    array, file = rows(0, 10).astype(object), io.BytesIO()
    np.save(file, array)
    for content in (
        dumped(with_centres(array)),
        pickle.dumps(with_centres(array)),
        in_torch({"cluster_centers_": array}),
    ):
        with pytest.raises(ValueError, match="somebodys: holds an array of Python objects"):
            opened(tmp_path, content)
    with pytest.raises(ValueError, match="somebodys: an array of object"):
        opened(tmp_path, file.getvalue())


def test_arrays_that_lie_in_other_files_are_not_followed(fitted: cluster.MiniBatchKMeans, tmp_path: Path) -> None:
    content = dumped(fitted, protocol=3).replace(b"\nNumpyArrayWrapper\n", b"\nNDArrayWrapper\n")
    with pytest.raises(ValueError, match="keeps its arrays in other files, as joblib before"):
        opened(tmp_path, content)


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress], ids=["gzip", "xz"])
def test_a_small_file_that_unpacks_to_much_is_refused_before_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(foreign_kmeans, "MAX_BYTES", 2**20)
    bomb = compress(b"\x80\x04" + bytes(2**26))
    tracemalloc.start()
    with pytest.raises(ValueError, match="somebodys: decompresses to more than 1048576 bytes"):
        opened(tmp_path, bomb)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_an_archive_of_torch_that_unpacks_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**20))
    with pytest.raises(ValueError, match="somebodys has a compressed entry"):
        opened(tmp_path, file.getvalue())


def claiming(size: int) -> list[bytes]:
    """Files of few bytes that say they have arrays of `size` rows."""
    before = [dumped(with_centres(rows(0, 10)), protocol=3), pickle.dumps(with_centres(rows(0, 10)), protocol=3)]
    claim = b"\x8a\x08" + size.to_bytes(8, "little") + b"K\x08\x86"
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": (size, 8), "fortran_order": False, "descr": "<f4"})
    expanded = in_torch({"cluster_centers_": torch.zeros(1, 8).expand(size, 8)})
    bytes_of_protocol_5 = b"\x80\x05\x96" + size.to_bytes(8, "little") + b"1234."
    assert all(b"K\x0aK\x08\x86" in content for content in before)
    return [
        *(content.replace(b"K\x0aK\x08\x86", claim) for content in before),
        file.getvalue(),
        expanded,
        bytes_of_protocol_5,
    ]


@pytest.mark.parametrize("number", range(5))
def test_an_array_larger_than_its_file_is_refused_before_there_is_memory_for_it(tmp_path: Path, number: int) -> None:
    content = claiming(2**33)[number]
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=r"somebodys:? (ends before|has 320 bytes|0 bytes for|has a tensor of shape|corrupt)"
    ):
        opened(tmp_path, content)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (rows(0)[0], r"an array of shape \(8,\) where centroids are"),
        (rows(0)[None], r"an array of shape \(1, 500, 8\) where"),
        (rows(0)[:0], r"an array of shape \(0, 8\) where"),
        (np.zeros((2**16 + 1, 1), np.float32), "65537 centroids, but labels can name 65536"),
        (np.array([[1.0, np.nan], [2.0, 3.0]]), "1 of 2 centroids are NaN or infinite"),
        (np.array([[1.0, 2.0], [np.inf, 1e300]]), "1 of 2 centroids are NaN or infinite"),
        (np.array([[1, 2], [3, 4]]), "int64, where centroids are floating-point"),
    ],
    ids=["one row", "three axes", "none", "too many", "NaN", "infinite", "integers"],
)
def test_what_cannot_be_centroids_is_refused(tmp_path: Path, array: np.ndarray, sentence: str) -> None:
    file = io.BytesIO()
    np.save(file, array)
    tensor = in_torch({"cluster_centers_": torch.from_numpy(array)})
    for content in (file.getvalue(), dumped(with_centres(array)), pickle.dumps(with_centres(array)), tensor):
        with pytest.raises(ValueError, match=f"somebodys: .*{sentence}"):
            opened(tmp_path, content)


def every_format() -> dict[str, bytes]:
    file = io.BytesIO()
    np.save(file, rows(0, 10))
    kmeans = with_centres(rows(0, 10))
    return {
        "joblib": dumped(kmeans),
        "gzip": dumped(kmeans, compress=("gzip", 3)),
        "xz": dumped(kmeans, compress=("xz", 3)),
        "pickle": pickle.dumps(kmeans),
        "numpy": file.getvalue(),
        "torch": in_torch({"cluster_centers_": torch.from_numpy(rows(0, 10))}),
    }


EVERY_FORMAT = every_format()


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_a_file_that_ends_too_early_is_refused(tmp_path: Path, name: str) -> None:
    content = EVERY_FORMAT[name]
    for end in range(0, len(content) - 8, 7):
        with pytest.raises(ValueError, match=r"^[^\n]*somebodys:? [^\n]*$"):
            opened(tmp_path, content[:end])


@given(st.sampled_from([*EVERY_FORMAT]), st.data())
def test_a_damaged_file_is_refused_in_one_sentence_or_has_finite_centroids(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    content = bytearray(EVERY_FORMAT[name])
    for _ in range(3):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    said = ""
    try:
        centroids, _ = opened(tmp_path_factory.getbasetemp(), bytes(content))
    except ValueError as error:
        said = str(error)
    assert ("somebodys" in said and "\n" not in said) if said else np.isfinite(centroids).all()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (pickle.dumps(cluster.KMeans(3)), "a K-means that was never fitted"),
        (pickle.dumps({"centres": 3}), "a pickle that holds no K-means of scikit-learn"),
        (b"not centroids", "no K-means centroids in this file; give our .safetensors"),
        (b"", "no K-means centroids in this file"),
        (b"ZF0x17\n", "compressed with lz4, or by joblib before 0.10"),
        (in_torch({"state_dict": {}}), "holds something else than the expected array"),
        (in_torch({}, _use_new_zipfile_serialization=False), "holds something else than the expected array"),
    ],
    ids=["unfitted", "dict", "text", "empty", "old joblib", "checkpoint", "old torch"],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"somebodys: {sentence}"):
        opened(tmp_path, content)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.bin: no such file"):
        load_kmeans(tmp_path / "nowhere.bin")


def test_a_quantizer_has_as_many_clusters_as_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "kmeans.safetensors"
    save_kmeans(path, [torch.zeros(5, 2), torch.zeros(9, 2)], {"features": "mfcc"})
    assert [len(stream) for stream in LabelRecipe(clusters=[5, 9], quantizer=path).given[0]] == [5, 9]
    with pytest.raises(ValueError, match=r"kmeans.safetensors: a K-means with \[5, 9\] clusters, but \[9, 5\] are"):
        _ = LabelRecipe(clusters=[9, 5], quantizer=path).given
