import gzip
import os

import pytest

from medfast.data.mimic_cxr import caption_of_report, read
from medfast.data.skipped import Skipped
from medfast.errors import UsageError

REPORT = """\
                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with new onset ascites  // eval for infection

 TECHNIQUE:  Chest PA and lateral

 COMPARISON:  None.

 FINDINGS:

 There is no focal consolidation, pleural effusion or pneumothorax.
 The cardiomediastinal silhouette is normal.

 IMPRESSION:

 No acute cardiopulmonary process.
"""
FOUND = (
    "There is no focal consolidation, pleural effusion or pneumothorax. The cardiomediastinal "
    "silhouette is normal. No acute cardiopulmonary process."
)


@pytest.mark.parametrize(
    ("report", "caption"),
    [
        (REPORT, FOUND),
        (REPORT.replace("\n", "\r\n"), FOUND),
        (REPORT.replace("FINDINGS", "Findings").replace("IMPRESSION", "Impression"), FOUND),
        (REPORT.replace("FINDINGS:\n", "FINDINGS:   \n"), FOUND),
        (REPORT.replace("FINDINGS:\n", "FINDINGS :\n"), FOUND),
        (REPORT.replace("                                 FINAL REPORT\n", ""), FOUND),
        (f"WET READ: Wrong at first.\n{'_' * 40}\n{REPORT}", FOUND),
        ("FINDINGS: Clear lungs.", "Clear lungs."),
        ("IMPRESSION: Clear lungs.", "Clear lungs."),
        ("FINDING: Clear.\nIMPRESSIONS: Normal.", "Clear. Normal."),
        ("FINDINGS AND IMPRESSION: Clear lungs.", "Clear lungs."),
        ("FINDINGS/IMPRESSION: Clear lungs.", "Clear lungs."),
        ("FINDINGS & IMPRESSION:\n Clear lungs.", "Clear lungs."),
        ("IMPRESSION AND RECOMMENDATION: Clear; repeat.", "Clear; repeat."),
        ("IMPRESSION: Normal.\n\nFINDINGS: Clear.", "Normal. Clear."),
        ("CONCLUSION: Normal.", "Normal."),
        ("FINDINGS\n\n Clear lungs.\n\nIMPRESSION\n\n Normal.", "Clear lungs. Normal."),
        (
            "IMPRESSION:\n 1. Small effusion.\n 2. No pneumothorax.",
            "1. Small effusion. 2. No pneumothorax.",
        ),
        ("FINDINGS: Seen by Dr. ___ at ____ today.", "Seen by Dr. ___ at ___ today."),
        (
            "FINDINGS: Heart: normal in size. Lungs: clear at 10:30.",
            "Heart: normal in size. Lungs: clear at 10:30.",
        ),
        ("FINDINGS:\n LUNGS: Clear.\n HEART: Normal.", "LUNGS: Clear. HEART: Normal."),
        ("FINDINGS: Clear.\nRECOMMENDATION: Repeat in a week.", "Clear."),
        ("FINDINGS: Clear.\nNOTIFICATION: Dr. ___ was told by phone.", "Clear."),
        ("FINDINGS: Clear.\n\nIMPRESSION: Clear.", "Clear."),
        ("FINDINGS: One.\nCOMPARISON: ___.\nFINDINGS: Two.", "One. Two."),
        ("COMPARISON: None. IMPRESSION: Clear lungs.", "Clear lungs."),
        ("INDICATION: Fever.\nFINDINGS:\nIMPRESSION: Clear.", "Clear."),
        (
            "INDICATION: Fever.\n\nPORTABLE CHEST, 5:13 A.M.: The heart is of normal size.",
            "The heart is of normal size.",
        ),
        (
            "HISTORY: Cough.\n\n The lungs are clear and the heart is not enlarged.",
            "The lungs are clear and the heart is not enlarged.",
        ),
        ("COMPARISON: ___.\nINDICATION: A cough of two weeks.", "A cough of two weeks."),
        ("The lungs are clear.", "The lungs are clear."),
        ("  \n\t\n", ""),
        ("", ""),
        ("FINDINGS:\n\nIMPRESSION:\n", ""),
        ("FINAL REPORT\n", ""),
        ("The findings are unchanged: no effusion.", "The findings are unchanged: no effusion."),
        ("IMPRESSION: Épanchement à gauche — 3 x 4 cm.", "Épanchement à gauche — 3 x 4 cm."),
        ("FINDINGS: A.\n\n B.\n\n C.", "A. B. C."),
    ],
)
def test_the_caption_is_the_findings_and_the_impression(report, caption):
    assert caption_of_report(report) == caption


def test_a_long_report_takes_no_long_time():
    assert caption_of_report("A B, C/" * 20000 + "\nFINDINGS: x" + " y" * 50000).startswith("x y")


ROWS = [
    ("d1", 50000001, 10000032, "train"),
    ("d2", 50000001, 10000032, "train"),
    ("d3", 50000002, 10000033, "validate"),
    ("d4", 50000003, 11000034, "test"),
]


def _write(root, rows=ROWS, suffix=".jpg", reports="files", packed=True):
    root.mkdir(parents=True, exist_ok=True)
    text = "dicom_id,study_id,subject_id,split\n"
    for dicom, study, patient, split in rows:
        text += f"{dicom},{study},{patient},{split}\n"
        folder = f"p{str(patient)[:2]}/p{patient}/s{study}"
        image = root / "files" / folder / f"{dicom}{suffix}"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(b"x")
        report = root / reports / f"{folder}.txt"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(f"IMPRESSION: report of {study}")
    if packed:
        with gzip.open(root / "mimic-cxr-2.0.0-split.csv.gz", "wt") as file:
            file.write(text)
    else:
        (root / "mimic-cxr-2.0.0-split.csv").write_text(text)
    return root


@pytest.mark.parametrize("suffix", [".jpg", ".dcm"])
@pytest.mark.parametrize(
    "reports", ["files", "mimic-cxr-reports/files", "mimic-cxr-reports", "reports"]
)
@pytest.mark.parametrize("packed", [True, False])
def test_reads_images_with_the_report_of_their_study(tmp_path, suffix, reports, packed):
    root = _write(tmp_path / "mimic", suffix=suffix, reports=reports, packed=packed)
    records = list(read(root, "train"))
    assert [r.key for r in records] == ["d1", "d2"]
    folder = root / "files/p10/p10000032/s50000001"
    assert [r.image for r in records] == [folder / f"d1{suffix}", folder / f"d2{suffix}"]
    assert {r.caption for r in records} == {"report of 50000001"}
    assert {(r.study, r.origin) for r in records} == {("s50000001", "patient mimic:10000032")}
    assert [r.key for r in read(root, "validation")] == ["d3"]
    assert [r.key for r in read(root, "test")] == ["d4"]


def test_reports_may_lie_beside_the_folder(tmp_path):
    root = _write(tmp_path / "mimic", reports="../mimic-cxr-reports/files")
    assert len(list(read(root, "train"))) == 2


def test_a_study_without_a_report_is_skipped(tmp_path):
    root = _write(tmp_path, [*ROWS, ("d5", 50000009, 10000039, "train")])
    (root / "files/p10/p10000039/s50000009.txt").unlink()
    (skipped,) = [r for r in read(root, "train") if isinstance(r, Skipped)]
    assert (skipped.key, skipped.reason) == ("d5", "the study has no report")


def test_bad_rows_are_skipped_and_come_with_train(tmp_path):
    rows = [*ROWS, ("d6", 1, 2, "trian"), ("", 50000001, 10000032, "train")]
    root = _write(tmp_path, rows)
    bad = [r for r in read(root, "train") if isinstance(r, Skipped)]
    assert [r.key for r in bad] == ["d6", "line 7"]
    assert not [r for r in read(root, "test") if isinstance(r, Skipped)]


def test_missing_files_say_what_to_get_and_under_which_agreement(tmp_path):
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UsageError, match=r"physionet\.org.*Credentialed Health Data License"):
            next(read(root, "train"))


def test_missing_reports_say_where_they_are_looked_for(tmp_path):
    root = _write(tmp_path, reports="elsewhere")
    with pytest.raises(UsageError, match=r"mimic-cxr-reports/files/p10/p10000032/s50000001\.txt"):
        next(read(root, "train"))


def test_a_missing_column_names_the_columns(tmp_path):
    (tmp_path / "mimic-cxr-2.0.0-split.csv").write_text("dicom_id,study_id,split\na,1,train\n")
    with pytest.raises(UsageError, match=r"subject_id.*dicom_id, study_id, split"):
        next(read(tmp_path, "train"))


def test_a_split_without_a_pair_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no test pair"):
        list(read(_write(tmp_path, ROWS[:2]), "test"))


def test_a_report_that_is_a_named_pipe_is_not_waited_for(tmp_path):
    table = "dicom_id,study_id,subject_id,split\n"
    table += "".join(f"d{i},5000000{i},10000032,train\n" for i in (1, 2))
    (tmp_path / "mimic-cxr-2.0.0-split.csv").write_text(table)
    folder = tmp_path / "files" / "p10" / "p10000032"
    folder.mkdir(parents=True)
    (folder / "s50000001.txt").write_text(REPORT)
    os.mkfifo(folder / "s50000002.txt")
    good, bad = read(tmp_path, "train")
    assert (good.key, bad.key, bad.reason) == ("d1", "d2", "the study has no report")


def test_an_id_that_no_file_can_have_is_a_bad_row(tmp_path):
    table = "dicom_id,study_id,subject_id,split\n"
    table += f"d1,50000001,10{'1' * 300},train\nd2,50000001,10000032,train\n"
    (tmp_path / "mimic-cxr-2.0.0-split.csv").write_text(table)
    (tmp_path / "files" / "p10" / "p10000032").mkdir(parents=True)
    (tmp_path / "files" / "p10" / "p10000032" / "s50000001.txt").write_text(REPORT)
    bad, good = read(tmp_path, "train")
    assert (bad.key, bad.reason, good.key) == ("d1", "the study has no report", "d2")
