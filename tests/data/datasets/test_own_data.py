"""Data of one's own: nnU-Net's layout, COCO, a table, two folders."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from samjax.data import DataError, FolderDataset, Slices
from samjax.data.datasets.coco import _unpacked, coco
from samjax.data.datasets.csv_table import csv_table
from samjax.data.datasets.image_folder import image_folder
from samjax.data.datasets.nnunet import nnunet
from samjax.data.intensity import MinMax, Percentiles, Window
from samjax.data.layouts.own import write_coco, write_csv, write_nnunet

nibabel = pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")
# pycocotools 2.0.11 hands numpy an array in the way of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def same(left, right) -> bool:
    return all(np.array_equal(left[key], right[key]) for key in left)


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def save(file: Path, values, mode: str | None = None, **options) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).convert(mode).save(file, **options)


# nnU-Net


def test_nnunet_volumes_are_those_of_nibabel(tmp_path):
    drawn = write_nnunet(tmp_path)
    dataset = nnunet(tmp_path)
    assert dataset.names == ("case_000", "case_001", "case_002")
    assert (dataset.class_names, dataset.modalities) == (("organ", "lesion"), ("CT",))
    assert dataset.intensity == Window(-125, 275)
    for index, name in enumerate(dataset.names):
        scan = dataset[index]
        image = nibabel.load(tmp_path / "imagesTr" / f"{name}_0000.nii.gz")
        label = nibabel.load(tmp_path / "labelsTr" / f"{name}.nii.gz")
        assert np.array_equal(scan.volumes[0].array, image.get_fdata())
        assert np.allclose(scan.volumes[0].affine, image.affine)
        assert np.array_equal(scan.label, label.get_fdata())
        assert np.array_equal(scan.label, drawn[name])
    again = pickle.loads(pickle.dumps(dataset))[0]
    assert np.array_equal(again.label, dataset[0].label)
    assert len(Slices(dataset, take="foreground")) == 3 * 4
    test = nnunet(tmp_path, "test", intensity=MinMax())
    assert np.array_equal(test[0].label, drawn["case_003"])
    assert test.intensity == MinMax()


def test_nnunet_channels_of_another_format_are_those_of_itk(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 99, (2, 4, 5, 6)).astype(np.int16)  # c z y x
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (tmp_path / folder).mkdir()
    for channel in (0, 1):
        for folder in ("imagesTr", "imagesTs"):
            image = sitk.GetImageFromArray(voxels[channel])
            sitk.WriteImage(image, str(tmp_path / folder / f"a_b_000{channel}.nrrd"))
    label = (voxels[0] > 50).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(label), str(tmp_path / "labelsTr" / "a_b.nrrd"))
    described = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "spot": 1}}
    described |= {"numTraining": 1, "file_ending": ".nrrd"}
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    scan = nnunet(tmp_path)[0]
    assert [np.array_equal(v.array.T, voxels[i]) for i, v in enumerate(scan.volumes)] == [True] * 2
    assert np.array_equal(scan.label.T, label)
    assert nnunet(tmp_path).intensity == Percentiles()
    test = nnunet(tmp_path, "test")[0]
    assert test.label.shape == (6, 5, 4)
    assert not test.label.any()


@pytest.fixture
def pictures(tmp_path):
    """nnU-Net with two RGB pictures, each in one file."""
    rng = np.random.default_rng(0)
    for name in ("x", "y"):
        save(tmp_path / "imagesTr" / f"{name}_0000.png", rng.integers(0, 255, (5, 7, 3), np.uint8))
        save(tmp_path / "labelsTr" / f"{name}.png", rng.integers(0, 3, (5, 7), np.uint8))
    described = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "cell": 2, "nucleus": 1},
        "numTraining": 2,
        "file_ending": ".png",
    }
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    return tmp_path


def test_nnunet_pictures_of_one_or_three_files(pictures):
    dataset = nnunet(pictures)
    one_file = [dataset[i] for i in (0, 1)]
    assert dataset.class_names == ("nucleus", "cell")
    assert same(pickle.loads(pickle.dumps(dataset))[1], one_file[1])
    label = np.asarray(Image.open(pictures / "labelsTr" / "x.png"))
    assert np.array_equal(one_file[0]["mask"], label)
    for name in ("x", "y"):
        file = pictures / "imagesTr" / f"{name}_0000.png"
        for number, channel in enumerate(Image.open(file).split()):
            channel.save(file.with_name(f"{name}_000{number}.png"))
    dataset = nnunet(pictures)
    assert all(same(dataset[i], one_file[i]) for i in (0, 1))
    assert len(dataset.cases[0].images) == 3
    save(pictures / "imagesTr" / "x_0001.png", one_file[0]["image"])
    with pytest.raises(DataError, match=r"x_0001.png: is in colour; expected one of three grey"):
        dataset[0]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"numTraining": 5}, "numTraining is 5, but imagesTr and labelsTr have 2 cases"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "the labels whole are regions"),
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, "a label 'ignore'"),
        ({"labels": {"background": 0, "a": 1, "b": 3}}, r"expected the numbers 0 \(background\)"),
        ({"labels": {"0": "background", "1": "a"}}, r"expected the numbers 0 \(background\)"),
        ({"file_ending": ".jpg"}, "file_ending '.jpg'; expected one of .nii.gz"),
        ({"channel_names": ["R"]}, "channel_names .*expected names for 0, 1, 2"),
        ({"channel_names": {"0": "a", "1": "b"}}, "pictures of 2 channels; expected 1 or 3"),
        ({"dataset": {}}, "lists its files under the key 'dataset'"),
    ],
)
def test_nnunet_refuses_what_the_json_says(pictures, changes, complaint):
    edit(pictures / "dataset.json", **changes)
    with pytest.raises(DataError, match=complaint):
        nnunet(pictures)


def test_nnunet_refuses_files_that_do_not_pair_up(pictures):
    save(pictures / "labelsTr" / "z.png", np.zeros((5, 7), np.uint8))
    with pytest.raises(DataError, match="labelsTr: does not pair up with imagesTr: z of one"):
        nnunet(pictures)
    (pictures / "labelsTr" / "z.png").unlink()
    (pictures / "labelsTr" / "y.png").unlink()
    with pytest.raises(DataError, match="does not pair up with imagesTr: y of one"):
        nnunet(pictures)
    save(pictures / "imagesTr" / "x_0001.png", np.zeros((5, 7), np.uint8))
    with pytest.raises(DataError, match=r"not the channels 0000, 0001, 0002 of x, y; .*R, G, B"):
        nnunet(pictures)
    save(pictures / "imagesTr" / "x.png", np.zeros((5, 7), np.uint8))
    with pytest.raises(DataError, match=r"x.png: expected a name like CASE_0000.png"):
        nnunet(pictures)


def test_nnunet_refuses_labels_of_no_class(pictures):
    save(pictures / "labelsTr" / "x.png", np.full((5, 7), 3, np.uint8))
    with pytest.raises(DataError, match=r"labelsTr/x.png: unknown values 3: the declared .* 1, 2"):
        nnunet(pictures)[0]


def test_nnunet_refuses_another_tree(tmp_path):
    with pytest.raises(DataError, match=r"no dataset.json \(found there: nothing\)(.|\n)*labelsTr"):
        nnunet(tmp_path)
    (tmp_path / "dataset.json").write_text('{"modality": {"0": "CT"}, "labels": {}}')
    with pytest.raises(DataError, match=r"no key channel_names, .*format of nnU-Net v1"):
        nnunet(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset.json: not a JSON file"):
        nnunet(tmp_path)
    with pytest.raises(ValueError, match="split 'val'"):
        nnunet(tmp_path, "val")


# COCO


def test_coco_phantom_is_what_was_drawn(tmp_path):
    pytest.importorskip("pycocotools.mask")
    drawn = write_coco(tmp_path)
    dataset = coco(tmp_path)
    assert dataset.class_names == ("nucleus", "cell")
    assert all(np.array_equal(dataset[i]["mask"], drawn[dataset.names[i]]) for i in range(3))
    assert not dataset[2]["mask"].any()
    assert same(pickle.loads(pickle.dumps(dataset))[0], dataset[0])
    cells = coco(tmp_path, categories=("cell",))
    assert cells.class_names == ("cell",)
    assert np.array_equal(cells[0]["mask"], drawn["picture_001"] > 0)  # below the nucleus too
    swapped = coco(tmp_path, categories=("cell", "nucleus"))
    assert np.array_equal(swapped[1]["mask"], np.array([0, 2, 1])[drawn["picture_002"]])
    with pytest.raises(ValueError, match="categories cell, hair: expected of nucleus, cell"):
        coco(tmp_path, categories=("cell", "hair"))


def test_coco_is_drawn_as_pycocotools_and_pillow_do(tmp_path):
    masks = pytest.importorskip("pycocotools.mask")
    api = pytest.importorskip("pycocotools.coco")
    write_coco(tmp_path, count=2, size=40)
    file = tmp_path / "annotations" / "instances_train.json"
    triangle = [5.5, 3.2, 36.1, 8.4, 12.3, 30.7]
    crowd = np.zeros((40, 40), np.uint8)
    crowd[10:12] = 1
    blob = np.asfortranarray(np.hypot(*(np.mgrid[:40, :40] - 25)) < 9, np.uint8)
    packed = masks.encode(blob)
    packed["counts"] = packed["counts"].decode()
    shapes = (
        (1, [triangle, [1, 30, 4, 30, 4, 38, 1, 38]], 7, 0),
        (2, packed, 3, 0),
        (3, masks.encode(np.asfortranarray(crowd)) | {"counts": [10, 2, *[38, 2] * 39, 28]}, 3, 1),
    )
    annotations = [
        {"id": n, "image_id": 1, "segmentation": s, "category_id": c, "iscrowd": k}
        for n, s, c, k in shapes
    ]
    edit(file, annotations=annotations)
    mask = coco(tmp_path)[0]["mask"]
    theirs = api.COCO(file)
    polygons, disc, band = (theirs.annToMask(theirs.anns[n]).astype(bool) for n in (1, 2, 3))
    assert np.array_equal(band, crowd == 1)
    assert polygons.sum() > disc.sum()
    expected = np.zeros((40, 40), np.uint8)
    for pixels, label in ((band, 1), (polygons, 2), (disc, 1)):  # crowd, large, small
        expected[pixels] = label
    assert np.array_equal(mask, expected)
    picture = Image.new("1", (40, 40))
    ImageDraw.Draw(picture).polygon(triangle, 1)
    ImageDraw.Draw(picture).rectangle((1, 30, 3, 37), 1)
    differ = polygons ^ np.asarray(picture)
    assert 0 < differ.sum() < 0.15 * polygons.sum()  # Pillow draws the outline too


@pytest.mark.parametrize(
    ("segmentation", "complaint"),
    [
        ([], "its segmentation is empty"),
        ([[1, 2, 3, 4]], "a polygon needs x and y of three or more points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon needs"),
        ({"size": [48, 48], "counts": [0, 9999]}, "run lengths of 9999 pixels; expected 2304"),
        ({"size": [10, 10], "counts": [100]}, r"run lengths of \[10, 10\]"),
        ({"size": [48, 48], "counts": "0R1"}, "run lengths of 34 pixels; expected 2304"),
        ({"size": [48, 48], "counts": 5}, "run lengths of no pixels"),
        ({"size": [48, 48], "counts": [2305, -1]}, "run lengths of 2304 pixels"),
        ({"counts": [1]}, "expected polygons, or run lengths"),
        ("x", "expected polygons, or run lengths"),
    ],
)
def test_coco_refuses_damaged_shapes(tmp_path, segmentation, complaint):
    pytest.importorskip("pycocotools.mask")
    write_coco(tmp_path)
    one = {"id": 1, "image_id": 1, "category_id": 7, "segmentation": segmentation}
    edit(tmp_path / "annotations" / "instances_train.json", annotations=[one])
    with pytest.raises(DataError, match=rf"instances_train.json: annotation 1: {complaint}"):
        coco(tmp_path)[0]


def test_coco_packed_run_lengths_cover_the_picture(rng):
    masks = pytest.importorskip("pycocotools.mask")
    for share in (0.0, 0.02, 0.5, 1.0):
        mask = np.asfortranarray(rng.random((37, 53)) < share, np.uint8)
        runs = _unpacked(masks.encode(mask)["counts"].decode())
        assert sum(runs) == 37 * 53
        assert sum(runs[1::2]) == mask.sum()


def test_coco_refuses_what_points_nowhere(tmp_path):
    with pytest.raises(DataError, match=r"no annotations/instances_train.json(.|\n)*expected"):
        coco(tmp_path)
    write_coco(tmp_path)
    (tmp_path / "train" / "picture_002.png").unlink()
    with pytest.raises(DataError, match=r"1 image files are missing: .*train/picture_002.png"):
        coco(tmp_path)
    file = tmp_path / "annotations" / "instances_train.json"
    one = {"id": 4, "image_id": 9, "category_id": 7, "segmentation": [[0] * 6]}
    edit(file, annotations=[one])
    with pytest.raises(DataError, match="annotation 4: there is no image 9"):
        coco(tmp_path)
    edit(file, annotations=[one | {"image_id": 1, "category_id": 8}])
    with pytest.raises(DataError, match="annotation 4: there is no category 8"):
        coco(tmp_path)
    edit(file, annotations=[{"id": 4, "image_id": 1, "category_id": 7, "bbox": [1, 1, 2, 2]}])
    with pytest.raises(DataError, match="annotations: 4 lacks segmentation"):
        coco(tmp_path)
    edit(file, images=[{"id": 1}, {"id": 1}])
    with pytest.raises(DataError, match="images: 1 lacks file_name, height, width"):
        coco(tmp_path)
    file.write_text("[]")
    with pytest.raises(DataError, match="expected an object with the keys images"):
        coco(tmp_path)


def test_coco_must_know_the_size_after_rotation(tmp_path):
    write_coco(tmp_path, size=40)
    picture = np.zeros((30, 40, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "train" / "picture_001.png", picture, exif=exif)
    with pytest.raises(DataError, match=r"picture_001.png is 30x40 .*EXIF .* json says 40x40"):
        coco(tmp_path)[0]


# a table


def test_csv_splits_and_pairs(tmp_path):
    table = write_csv(tmp_path)
    train, test = csv_table(tmp_path), csv_table(table, "test")
    assert train.names == ("eye00", "eye01", "eye02", "eye03")
    assert test.names == ("eye04", "eye05")
    assert not set(train.patients) & set(test.patients)
    assert csv_table(tmp_path, "all").names == train.names + test.names
    mask = np.asarray(Image.open(tmp_path / "masks" / "eye02.png"))
    assert np.array_equal(train[2]["mask"], mask == 255)
    assert same(pickle.loads(pickle.dumps(train))[1], train[1])
    named = csv_table(tmp_path, classes=(255,), class_names=("disc",))
    assert (named.class_names, csv_table(tmp_path).class_names) == (("disc",), ("foreground",))


def test_csv_of_volumes(tmp_path):
    drawn = write_nnunet(tmp_path, train=2, test=0)
    text = "image,mask\nimagesTr/case_000_0000.nii.gz,labelsTr/case_000.nii.gz\n"
    (tmp_path / "t.csv").write_text(text + "imagesTr/case_001_0000.nii.gz,\n")
    dataset = csv_table(tmp_path, classes=(2, 1), class_names=("lesion", "organ"))
    assert dataset.names == ("case_000_0000", "case_001_0000")
    assert np.array_equal(dataset[0].label, np.array([0, 2, 1])[drawn["case_000"]])
    assert not dataset[1].label.any()
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(again[0].label, dataset[0].label)
    with pytest.raises(DataError, match=r"case_000.nii.gz: values 2 are no class"):
        csv_table(tmp_path)[0]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "empty; expected the columns image"),
        ("image,maks\n", "line 1: unknown column 'maks'; expected image"),
        ("mask\n", "line 1: columns mask; expected image"),
        ("image\na.png\n\nb.png\n", "line 4, column image: .*b.png: no such file"),
        ("image,mask\na.png,b.png\n", "line 2, column mask: .*b.png: no such file"),
        ("image,mask\n,a.png\n", "line 2, column image: is empty"),
        ("image,mask\na.png\n", "line 2: 1 fields; expected 2"),
        ("image,split\na.png,\n", "line 2, column split: is empty"),
        ("image\nt.csv\n", "line 2, column image: t.csv; expected .bmp"),
        ("image\na.png\nv.nrrd\n", "line 2 has a picture, line 3 a volume"),
        ("image,mask\na.png,v.nrrd\n", "line 2: one of a.png and v.nrrd is a volume"),
        ("image\na.png\na.png\n", "line 3: the name a is that of line 2"),
        (
            "image,patient,split,name\na.png,P,train,1\na.png,P,test,2\n",
            r"patient P is in the split train \(line 2\) and in test \(line 3\)",
        ),
        ("image,split\na.png,test\n", "no row of the split 'train'; found test"),
        ('image\n"a.png\n', "not a CSV in UTF-8"),
    ],
)
def test_csv_errors_name_line_and_column(tmp_path, text, complaint):
    save(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "v.nrrd").touch()
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=rf"t.csv.*{complaint}"):
        csv_table(tmp_path)


def test_csv_table_must_be_one(tmp_path):
    with pytest.raises(DataError, match=r"no table \(.csv\) (.|\n)*image,mask,patient,split,name"):
        csv_table(tmp_path)
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.csv").touch()
    with pytest.raises(DataError, match=r"2 tables \(a.csv, b.csv\); name the one"):
        csv_table(tmp_path)
    with pytest.raises(ValueError, match=r"classes .*: expected different whole numbers above 0"):
        csv_table(tmp_path, classes=(1, 1))


# two folders


def test_folders_pair_as_folder_dataset_does(tmp_path):
    write_csv(tmp_path)
    dataset, plain = image_folder(tmp_path), FolderDataset(tmp_path / "images", tmp_path / "masks")
    assert len(dataset) == len(plain) == 6
    assert all(np.array_equal(dataset[i]["mask"], plain[i]["mask"]) for i in range(6))
    assert all(np.array_equal(dataset[i]["image"], plain[i]["image"]) for i in range(6))
    assert same(pickle.loads(pickle.dumps(dataset))[5], dataset[5])
    with pytest.raises(DataError, match=r"no test/images (.|\n)*a folder a split"):
        image_folder(tmp_path, "test")
    (tmp_path / "test").mkdir()
    for folder in ("images", "masks"):
        (tmp_path / folder).rename(tmp_path / "test" / folder)
    assert image_folder(tmp_path, "test", classes=(255,)).class_names == ("class 255",)
    with pytest.raises(ValueError, match="2 class_names for 1 classes"):
        image_folder(tmp_path, "test", class_names=("a", "b"))
    (tmp_path / "test" / "masks" / "eye03.png").unlink()
    with pytest.raises(DataError, match=r"images without a mask \(1\): eye03.png"):
        image_folder(tmp_path, "test")


def test_pictures_that_are_refused_or_turned(tmp_path):
    upright = np.repeat(np.random.default_rng(0).integers(0, 255, (8, 16, 1), np.uint8), 3, axis=2)
    save(tmp_path / "images" / "cmyk.jpg", upright, "CMYK")
    save(tmp_path / "images" / "deep.png", np.full((8, 16), 999, np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter, clockwise
    save(tmp_path / "images" / "turned.jpg", upright, exif=exif, quality=95)
    for name in ("cmyk", "deep"):
        save(tmp_path / "masks" / f"{name}.png", np.zeros((8, 16), np.uint8))
    save(tmp_path / "masks" / "turned.png", np.eye(16, 8, dtype=np.uint8))
    dataset = image_folder(tmp_path)
    with pytest.raises(DataError, match=r"cmyk.jpg: pixel format CMYK"):
        dataset[0]
    with pytest.raises(DataError, match=r"deep.png: more than 8 bits per channel"):
        dataset[1]
    image = dataset[2]["image"]
    assert image.shape == (16, 8, 3)
    assert np.abs(image.astype(int) - np.rot90(upright, -1).astype(int)).mean() < 4
    assert dataset[2]["mask"].shape == (16, 8)
    save(tmp_path / "masks" / "turned.png", np.zeros((8, 16), np.uint8))
    with pytest.raises(DataError, match=r"turned.png: the mask is 16x8 .*turned.jpg is 8x16"):
        dataset[2]
