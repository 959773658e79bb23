"""What single data sets say of their images, and what is wrong with some of their rows."""

import io
import json
import os

import h5py
import numpy as np
import openpyxl
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from medfast.data.classification import read, read_splits
from medfast.data.decode import decode
from medfast.data.sources import AbsentError
from medfast.errors import UsageError


def _image(path, seed=0, size=(8, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def _labels(split):
    return {
        record.key: split.classes[label]
        for record, label in zip(split.samples, split.labels, strict=True)
    }


def _reasons(split):
    return {item.key: item.reason for item in split.skipped}


def _table(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _xlsx(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)


# BACH and LC25000


@pytest.mark.parametrize("inner", ["", "Photos", "ICIAR2018_BACH_Challenge/Photos"])
def test_bach_lies_in_the_challenges_folders(tmp_path, inner):
    names = {"Normal": "n", "Benign": "b", "InSitu": "is", "Invasive": "iv"}
    for seed, (folder, stem) in enumerate(names.items()):
        _image(tmp_path / inner / folder / f"{stem}001.tif", seed)
    (tmp_path / inner / "Benign" / "Thumbs.db").write_bytes(b"x")
    found = _labels(read("bach", tmp_path, "all"))
    prefix = f"{inner}/" if inner else ""
    assert found == {
        f"{prefix}Benign/b001.tif": "benign tissue",
        f"{prefix}InSitu/is001.tif": "in-situ carcinoma",
        f"{prefix}Invasive/iv001.tif": "invasive carcinoma",
        f"{prefix}Normal/n001.tif": "normal breast tissue",
    }


def test_a_missing_class_is_named(tmp_path):
    for folder in ("Benign", "InSitu", "Normal"):
        _image(tmp_path / folder / "a.tif")
    with pytest.raises(UsageError, match=r"bach: .* lacks Invasive\. Get .*\(CC BY-NC-ND 4\.0\)"):
        read("bach", tmp_path, "all")


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    root = tmp_path / "bach"
    for folder in ("Benign", "InSitu", "Invasive", "Normal"):
        _image(root / folder / "a.png")
    _image(tmp_path / "secret.png")
    (root / "Normal" / "b.png").symlink_to(tmp_path / "secret.png")
    (root / "Normal" / "c.png").symlink_to(root / "Normal" / "a.png")
    found = read("bach", root, "all")
    assert _reasons(found) == {"Normal/b.png": "it is a link that leads out of the folder"}
    assert "Normal/c.png" in _labels(found)


def _parquet(path, columns, names=None):
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "JPEG")
    count = len(next(iter(columns.values())))
    table = pyarrow.table({"image": [{"bytes": file.getvalue(), "path": "a"}] * count, **columns})
    if names is not None:
        features = {column: {"names": own} for column, own in names.items()}
        text = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


def test_labels_in_parquet_follow_the_names_in_the_file(tmp_path):
    names = {"label": ["Normal", "Invasive", "InSitu", "Benign"]}
    _parquet(tmp_path / "data/train-0.parquet", {"label": [0, 1, 2, 3]}, names)
    found = _labels(read("bach", tmp_path, "all"))
    assert list(found.values()) == [
        "normal breast tissue",
        "invasive carcinoma",
        "in-situ carcinoma",
        "benign tissue",
    ]


@pytest.mark.parametrize("names", [None, {"other": ["x"]}, {"label": "not a list of names"[:0]}])
def test_labels_in_parquet_without_names_are_indices(tmp_path, names):
    _parquet(tmp_path / "a.parquet", {"label": [3, 0]}, names)
    found = _labels(read("bach", tmp_path, "all"))
    assert list(found.values()) == ["normal breast tissue", "benign tissue"]


def test_bad_labels_in_parquet_are_skipped(tmp_path):
    _parquet(tmp_path / "a.parquet", {"label": [4, None, 1, -1]})
    found = read("bach", tmp_path, "all")
    assert _labels(found) == {"a.parquet/2": "in-situ carcinoma"}
    assert set(_reasons(found)) == {"a.parquet/0", "a.parquet/1", "a.parquet/3"}
    assert "label: its label must be one of Benign," in found.skipped[0].reason


def test_some_of_several_parquet_files_are_refused(tmp_path):
    for name in ("train-00000-of-00003-0a.parquet", "train-00002-of-00003-0b.parquet"):
        _parquet(tmp_path / "data" / name, {"label": [0]})
    with pytest.raises(UsageError, match=r"must hold 3 files train-\*-of-00003; it holds 2\."):
        read("bach", tmp_path, "all")
    _parquet(tmp_path / "data" / "train-00001-of-00003-0c.parquet", {"label": [0]})
    assert len(read("bach", tmp_path, "all")) == 3


def test_lc25000_in_parquet_is_two_sets(tmp_path):
    names = {
        "organ": ["lung", "colon"],
        "label": ["benign", "adenocarcinomas", "squamous carcinomas"],
    }
    columns = {"organ": [0, 0, 1, 1], "label": [0, 2, 1, 0]}
    for given in (names, None):
        _parquet(tmp_path / "data" / "train-00000-of-00001.parquet", columns, given)
        lung, colon = (_labels(read(f"lc25000_{o}", tmp_path, "all")) for o in ("lung", "colon"))
        assert list(lung.values()) == ["benign lung", "lung squamous cell carcinoma"]
        assert list(colon.values()) == ["colon adenocarcinoma", "benign colonic tissue"]


@pytest.mark.parametrize("inner", ["", "lung_colon_image_set"])
def test_lc25000_lies_in_folders(tmp_path, inner):
    for name in ("lung_n", "lung_aca", "lung_scc"):
        _image(tmp_path / inner / "lung_image_sets" / name / f"{name}1.jpeg")
    found = list(_labels(read("lc25000_lung", tmp_path, "all")).values())
    assert found == ["benign lung", "lung adenocarcinoma", "lung squamous cell carcinoma"]
    with pytest.raises(UsageError, match="lacks colon_image_sets"):
        read("lc25000_colon", tmp_path, "all")


# HAM10000 and PAD-UFES-20


def test_ham10000_finds_images_and_skips_bad_rows(tmp_path):
    _image(tmp_path / "HAM10000_images_part_1" / "ISIC_1.jpg")
    _image(tmp_path / "HAM10000_images_part_2" / "ISIC_2.jpg")
    _image(tmp_path / "ISIC_3.jpg")
    _image(tmp_path.parent / "secret.jpg")
    _table(
        tmp_path / "HAM10000_metadata.csv",
        "lesion_id,image_id,dx,age",
        "HAM_1,ISIC_1,nv,40",
        "HAM_1,ISIC_2,mel,",
        "HAM_2,ISIC_3,df,3",
        "HAM_3,ISIC_4,akiec,",
        "HAM_3,ISIC_3,nv,",
        "HAM_4,ISIC_5,xyz,",
        "HAM_4,ISIC_6,,",
        ",ISIC_7,nv,",
        "HAM_5,../secret,nv,",
        "HAM_5,/etc/passwd,nv,",
        "HAM_5,short",
    )
    found = read("ham10000", tmp_path, "all")
    assert _labels(found) == {
        "ISIC_1": "melanocytic nevi",
        "ISIC_2": "melanoma",
        "ISIC_3": "dermatofibroma",
        "ISIC_4": "actinic keratoses and intraepithelial carcinoma",
    }
    assert [record.image.is_file() for record in found.samples] == [True, True, True, False]
    assert found.samples[0].origin == found.samples[1].origin == "lesion ham10000:HAM_1"
    reasons = _reasons(found)
    assert reasons["ISIC_3"] == "it is listed before"
    assert "got xyz" in reasons["ISIC_5"]
    assert "got nothing" in reasons["ISIC_6"]
    assert "must have an image_id and a lesion_id" in reasons["ISIC_7"]
    assert "leads out of the folder" in reasons["../secret"]
    assert "leads out of the folder" in reasons["/etc/passwd"]
    assert "4 cells" in reasons["line 12"]


@pytest.mark.parametrize(
    "folder",
    [
        "images",
        "imgs_part_1",
        "imgs_part_3",
        "images/imgs_part_2",
        "imgs_part_1/imgs_part_1",
        "Dataset",
    ],
)
def test_pad_ufes_20_finds_its_images(tmp_path, folder):
    _image(tmp_path / folder / "PAT_1_2_3.png")
    _table(
        tmp_path / "metadata.csv",
        "patient_id,lesion_id,smoke,diagnostic,img_id",
        "PAT_1,2,,ACK,PAT_1_2_3.png",
        "PAT_1,2,,ACK,../../PAT_1_2_3.png",
        "PAT_1,2,,ack,PAT_4.png",
        ",2,,ACK,PAT_5.png",
    )
    found = read("pad_ufes_20", tmp_path, "all")
    assert _labels(found) == {"PAT_1_2_3.png": "actinic keratosis"}
    assert found.samples[0].image == tmp_path / folder / "PAT_1_2_3.png"
    assert found.samples[0].origin == "patient pad_ufes_20:PAT_1"
    assert set(_reasons(found)) == {"../../PAT_1_2_3.png", "PAT_4.png", "PAT_5.png"}


def test_a_missing_column_is_named(tmp_path):
    _table(tmp_path / "metadata.csv", "img_id,diagnostic", "a.png,ACK")
    with pytest.raises(UsageError, match=r"metadata\.csv has no column 'patient_id'"):
        read("pad_ufes_20", tmp_path, "test")


def test_a_set_of_nothing_but_bad_rows_says_why(tmp_path):
    _table(tmp_path / "metadata.csv", "img_id,patient_id,diagnostic", "a.png,P,xyz")
    said = r"holds no test image; .* as a\.png: its label must be"
    with pytest.raises(UsageError, match=said) as bad:
        read("pad_ufes_20", tmp_path, "test")
    # It is there: a suite must not take it for one that still has to be got.
    assert not isinstance(bad.value, AbsentError)
    _table(tmp_path / "metadata.csv", "img_id,patient_id,diagnostic")
    with pytest.raises(AbsentError, match=r"holds no test image\."):
        read("pad_ufes_20", tmp_path, "test")


def test_bad_rows_of_a_shared_table_come_with_the_test_split_alone(write):
    root = write("ham10000", per_class=20)
    table = root / "HAM10000_metadata.csv"
    table.write_text(table.read_text() + "HAM_X,ISIC_X,xyz,\n")
    found = read_splits("ham10000", root)
    assert [len(found[split].skipped) for split in ("train", "validation", "test")] == [0, 0, 1]


def test_files_that_are_missing_or_no_files_break_no_split(tmp_path):
    lines = [f"img{n}.png,P{n},ACK" for n in range(60)]
    _table(tmp_path / "metadata.csv", "img_id,patient_id,diagnostic", *lines)
    (tmp_path / "images").mkdir()
    for n in range(3):
        os.mkfifo(tmp_path / "images" / f"img{n}.png")
        (tmp_path / "images" / f"img{n + 3}.png").mkdir()
    found = read_splits("pad_ufes_20", tmp_path)
    assert sum(map(len, found.values())) == 60
    assert min(map(len, found.values())) > 1


# PatchCamelyon


def _pcam(root, labels, images=None, part="test"):
    images = len(labels) if images is None else images
    stem = root / f"camelyonpatch_level_2_split_{part}"
    root.mkdir(parents=True, exist_ok=True)
    with h5py.File(f"{stem}_x.h5", "w") as file:
        file["x"] = np.random.default_rng(0).integers(0, 256, (images, 96, 96, 3), np.uint8)
    with h5py.File(f"{stem}_y.h5", "w") as file:
        file["y"] = np.array(labels, np.uint8).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("inner", ["", "pcam", "pcamv1"])
def test_pcam_gives_patches_and_skips_bad_labels(tmp_path, inner):
    _pcam(tmp_path / inner, [1, 0, 7])
    found = read("pcam", tmp_path, "test")
    assert list(_labels(found).values()) == [
        "lymph node containing metastatic tumor tissue",
        "lymph node",
    ]
    assert _reasons(found) == {"test/2": "its label must be 0 or 1; got 7"}
    assert decode(found.samples[1].read()).size == (96, 96)


def test_pcam_refuses_files_that_do_not_belong_together(tmp_path):
    _pcam(tmp_path, [1, 0, 1], images=2)
    with pytest.raises(UsageError, match=r"_x\.h5 must have as many images .* got 2 and 3"):
        read("pcam", tmp_path, "test")


def test_pcam_names_the_file_that_is_missing(tmp_path):
    _pcam(tmp_path, [1])
    with pytest.raises(UsageError, match=r"lacks camelyonpatch_level_2_split_train_x\.h5.*CC0"):
        read("pcam", tmp_path, "train")


# SICAPv2

_HEADER = ["image_name", "NC", "G3", "G4", "G5", "G4C"]


def test_sicap_takes_the_greatest_grade(tmp_path):
    _xlsx(
        tmp_path / "SICAPv2/partition/Test/Test.xlsx",
        _HEADER,
        ["16B1_Block_Region_0.jpg", 0, 0, 0, 1, 1],
        ["16B1_Block_Region_1.jpg", 1, 0, 0, 0, 0],
        ["16B2_Block_Region_0.jpg", 0.2, 0.5, 0.3, 0, 0],
        ["16B3_Block_Region_0.jpg", 0, 0, 0, 0, 0],
        ["16B3_Block_Region_1.jpg", 1, 0, 1, 0, 0],
        ["16B3_Block_Region_2.jpg", None, "x", 1, 0, 0],
        [None, 1, 0, 0, 0, 0],
        [None] * 6,
        ["../16B9.jpg", 1, 0, 0, 0, 0],
        ["16B4_Block_Region_0.jpg", 1],
    )
    found = read("sicap", tmp_path, "test")
    assert _labels(found) == {
        "16B1_Block_Region_0.jpg": "isolated nest cells without lumen roseting patterns",
        "16B1_Block_Region_1.jpg": "benign glands",
        "16B2_Block_Region_0.jpg": "atrophic dense glands",
    }
    assert found.samples[0].image == tmp_path / "SICAPv2/images/16B1_Block_Region_0.jpg"
    assert found.samples[0].origin == found.samples[1].origin == "slide sicap:16B1"
    reasons = _reasons(found)
    assert "is the greatest" in reasons["16B3_Block_Region_0.jpg"]
    assert "is the greatest" in reasons["16B3_Block_Region_1.jpg"]
    assert "must be numbers" in reasons["16B3_Block_Region_2.jpg"]
    assert "must be numbers" in reasons["16B4_Block_Region_0.jpg"]
    assert reasons["row 8"] == "it has no image_name"
    assert "leads out of the folder" in reasons["../16B9.jpg"]
    assert len(reasons) == 6


def test_sicap_keeps_patients_with_several_slides_together(write):
    root = write("sicap", per_class=20)
    slides = sorted({path.name.partition("_")[0] for path in root.glob("images/*")})
    # The first slide of each patient is from train, the second, of the next class, from test.
    _xlsx(
        root / "wsi_labels.xlsx",
        ["slide_id", "patient_id", "Gleason_primary"],
        *([slide, 1 if at < 4 else at, 3] for at, slide in enumerate(slides)),
    )
    found = read_splits("sicap", root)
    origins = [{record.origin for record in split.samples} for split in found.values()]
    assert sum(map(len, origins)) == len(set.union(*origins))
    assert "patient sicap:1" in origins[2]
    # Of this patient's four slides three are from train.
    assert len(found["train"].skipped) == 6
    assert len(found["test"]) == 16


def test_sicap_names_a_missing_column_and_a_file_that_is_no_workbook(tmp_path):
    table = tmp_path / "partition/Test/Test.xlsx"
    _xlsx(table, ["image_name", "NC", "G3", "G4"], ["a.jpg", 1, 0, 0])
    with pytest.raises(UsageError, match="has no column 'G5'; its columns are: image_name, NC"):
        read("sicap", tmp_path, "test")
    for content in (b"", b"image_name,NC,G3", b"PK\x05\x06" + bytes(18)):
        table.write_bytes(content)
        with pytest.raises(UsageError, match=r"Test\.xlsx cannot be read .*; get a whole copy"):
            read("sicap", tmp_path, "test")


# VinDr-Mammo


def test_vindr_mammo_takes_images_with_exactly_one_category(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _table(
        tmp_path / "finding_annotations.csv",
        "study_id,series_id,image_id,finding_categories,xmin,split",
        "s1,r,mass,['Mass'],1,test",
        "s1,r,mass,['Mass'],9,test",
        "s1,r,both,\"['Mass', 'Skin Thickening']\",1,test",
        "s2,r,two rows,['Mass'],1,test",
        "s2,r,two rows,['Asymmetry'],1,test",
        "s2,r,none,['No Finding'],,test",
        "s3,r,node,['Suspicious Lymph Node'],1,test",
        "s3,r,trained,['Mass'],1,training",
        "s4,r,empty,,,test",
        "s4,r,zeros,[],,test",
        "s4,r,unknown,['Lump'],1,test",
        "s4,r,half,['Mass'],1,test",
        "s4,r,half,Mass,1,test",
        "s4,r,code,\"__import__('os').mkdir('code-was-run')\",1,test",
        "s4,r,../../out,['Mass'],1,test",
        "s4,r,late,['Mass'],1,validation",
        ",r,homeless,['Mass'],1,test",
    )
    found = read("vindr_mammo", tmp_path, "test")
    assert _labels(found) == {"mass": "mass", "node": "suspicious lymph node"}
    assert found.samples[0].image == tmp_path / "images/s1/mass.dicom"
    assert found.samples[0].origin == "study vindr_mammo:s1"
    assert set(_reasons(found)) == {
        "empty", "unknown", "half", "code", "../../out", "late", "homeless",
    }  # fmt: skip
    assert not os.path.exists("code-was-run")


def test_vindr_mammo_keeps_studies_together(write):
    root = write("vindr_mammo", per_class=10)
    table = root / "finding_annotations.csv"
    # An image of a study of train is listed under a study of test.
    lines = table.read_text().splitlines()
    trained = next(line for line in lines if line.endswith("training"))
    tested = next(line for line in lines if line.endswith("test"))
    study = tested.partition(",")[0]
    image = trained.split(",")[1]
    lines[lines.index(trained)] = f"{study},{image},['Mass'],training"
    table.write_text("\n".join(lines))
    found = read_splits("vindr_mammo", root)
    assert [item.key for item in found["train"].skipped] == [image]
    assert all(image != record.key for split in found.values() for record in split.samples)


# MedMNIST+


def _medmnist(path, labels, size=28, part="test", channels=(3,), **others):
    images = np.random.default_rng(0).integers(
        0, 256, (len(labels), size, size, *channels), np.uint8
    )
    arrays = {f"{part}_images": images, f"{part}_labels": np.array(labels, np.uint8), **others}
    np.savez_compressed(path, **arrays)
    return images


def test_medmnist_gives_the_pixels_as_they_are_stored(tmp_path):
    images = _medmnist(tmp_path / "pathmnist_224.npz", [[8], [0]], size=224)
    found = read("pathmnist", tmp_path, "test")
    assert found.labels.tolist() == [8, 0]
    pixels = [np.asarray(decode(record.read())) for record in found.samples]
    assert np.array_equal(np.stack(pixels), images)


def test_medmnist_reads_the_largest_size_and_says_so(tmp_path):
    for size, name in ((28, ""), (64, "_64"), (128, "_128")):
        _medmnist(tmp_path / f"octmnist{name}.npz", [[2]], size=size, channels=())
        found = read("octmnist", tmp_path, "test")
        assert decode(found.samples[0].read()).size == (size, size)
        assert found.notes == (f"images of {size} x {size} pixels",)


def test_medmnist_skips_labels_that_are_no_class(tmp_path):
    _medmnist(tmp_path / "pneumoniamnist.npz", [[1], [2], [0]], channels=())
    found = read("pneumoniamnist", tmp_path, "test")
    assert found.labels.tolist() == [1, 0]
    assert _reasons(found) == {"test/1": "its label must be one of 0 to 1; got [2]"}


def test_medmnist_takes_labels_without_their_second_axis(tmp_path):
    _medmnist(tmp_path / "bloodmnist.npz", [7, 1])
    assert read("bloodmnist", tmp_path, "test").labels.tolist() == [7, 1]


@pytest.mark.parametrize("labels", [[[1], [0], [1]], [[1, 0], [0, 1]], [[[1]], [[0]]]])
def test_medmnist_refuses_labels_of_another_shape(tmp_path, labels):
    labels = np.array(labels, np.uint8)
    _medmnist(tmp_path / "breastmnist.npz", [[1], [0]], channels=(), val_labels=labels)
    with np.load(tmp_path / "breastmnist.npz") as arrays:
        changed = {**arrays, "test_labels": labels}
    np.savez_compressed(tmp_path / "breastmnist.npz", **changed)
    with pytest.raises(UsageError, match=r"must have test_labels \[2, 1\]; got \["):
        read("breastmnist", tmp_path, "test")


def test_chestmnist_has_any_number_of_labels(tmp_path):
    rows = [[0] * 14, [1, 0, 0, 1] + [0] * 10, [2] + [0] * 13]
    _medmnist(tmp_path / "chestmnist.npz", rows, channels=())
    found = read("chestmnist", tmp_path, "test")
    assert found.labels.tolist() == rows[:2]
    captions = [record.caption for record in found.samples]
    assert captions == ["none of the classes", "atelectasis, infiltration"]
    assert list(_reasons(found)) == ["test/2"]
    fewer = read("chestmnist", tmp_path, "test", without=["atelectasis"])
    assert fewer.labels.tolist() == [row[1:] for row in rows[:2]]
