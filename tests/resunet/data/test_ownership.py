import itertools
import json
import os

import numpy as np
import pytest

from resunet.config import DataSettings
from resunet.data.dicom import DicomHeader, group_files
from resunet.data.identity import Salt
from resunet.data.ownership import Owned, Ownership, pseudonymous, refuse_torn_groups
from resunet.data.source import open_source
from resunet.data.walk import walk
from resunet.errors import InputError

SALT = Salt(bytes(32))


def header(**changes):
    values = dict(
        patient="P-1",
        study="1.2",
        series="1.2.3",
        modality="CT",
        stack="s",
        position=0.0,
        instance=1,
        frames=1,
        phases=("", "10.5"),
    )
    return DicomHeader(**values | changes)


def plant(root, *paths, **texts):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    for name, text in texts.items():
        (root / name.replace("_csv", ".csv").replace("_json", ".json")).write_text(text)


def ownership(*sources, masks=None):
    return Ownership(sources, walk(sources), masks, SALT)


def test_hidden_headers_group_files_as_the_open_ones_do():
    rng = np.random.default_rng(0)
    headers = {}
    for number, (patient, phase, place) in enumerate(itertools.product("ab", ("1", "2", ""), range(4))):
        headers[f"{rng.integers(1 << 30)}-{number}"] = header(
            patient=patient, position=5.0 * place, instance=number, phases=(phase, str(number))
        )
    hidden = {name: pseudonymous(one, SALT) for name, one in headers.items()}
    assert group_files(hidden) == group_files(headers)
    assert len(group_files(headers)) == 6
    one = pseudonymous(header(), SALT)
    assert (one.patient, one.study) == (SALT.identify("group", "P-1"), SALT.identify("study", "1.2"))
    assert "10.5" not in repr(one) and one.phases[0] == ""
    assert pseudonymous(header(patient="", study=""), SALT).patient == ""


def test_who_has_the_first_word_on_a_group(tmp_path):
    plant(tmp_path, "a.dcm", "b.dcm", "c.dcm", "d.dcm", groups_csv="stem,group\na,listed\nd.dcm,with ending\n")
    owners = ownership(tmp_path)

    def of(name, head):
        return owners.of([str(tmp_path / name)], pseudonymous(head, SALT) if head else None)

    assert (of("a.dcm", header()).group, of("a.dcm", header()).grouped) == (SALT.identify("group", "listed"), True)
    assert of("d.dcm", None).group == SALT.identify("group", "with ending")
    assert (of("b.dcm", header()).group, of("b.dcm", header()).grouped) == (SALT.identify("group", "P-1"), True)
    nobody = of("b.dcm", header(patient=""))
    assert (nobody.group, nobody.grouped) == (SALT.identify("study", "1.2"), False)
    assert of("c.dcm", None).group == SALT.identify("path", os.path.realpath(tmp_path / "c.dcm"))


def test_groups_and_ids_are_those_that_a_folder_gives(tmp_path):
    plant(tmp_path / "s", "images/a.png", "images/deep/b.png", groups_csv="stem,group\na,one\ndeep/b,two\n")
    plant(tmp_path / "t", "images/a.png")
    (tmp_path / "salt").write_text(bytes(32).hex())
    for source in ("s", "t"):
        root = tmp_path / source
        owners = ownership(root)
        for case in open_source(DataSettings(source=root, salt_file=tmp_path / "salt", channels="grey"), masks=False).cases:
            owned = owners.of([str(case.files[0])], None)
            assert owned.group == case.group_hmac
            assert owned.grouped == (source == "s")


def test_sets_inside_a_source_speak_for_themselves(tmp_path):
    plant(tmp_path / "deep" / "set", "images/a.png", "masks/a.tif", "images/b.png", groups_csv="stem,group\na,inner\n")
    plant(tmp_path, "deep/x.png", groups_csv="stem,group\ndeep/set/images/a,outer\ndeep/set/images/b,outer\n")
    plant(tmp_path / "deep" / "set", splits_json=json.dumps({"pool": ["a"], "val": [], "test": ["b"]}))
    owners = ownership(tmp_path)
    a, b, x = (owners.of([str(tmp_path / "deep" / name)], None) for name in ("set/images/a.png", "set/images/b.png", "x.png"))
    assert (a.group, b.group) == (SALT.identify("group", "inner"), SALT.identify("group", "outer"))
    assert (a.split, b.split, x.split) == ("pool", "test", None)
    assert (a.mask, b.mask) == (str(tmp_path / "deep/set/masks/a.tif"), None)
    assert a.id == SALT.identify("file", "deep/set/images/a.png")
    assert owners.mask_id(a.mask) == SALT.identify("mask", "deep/set/masks/a.tif")


def test_side_files_that_cannot_be_used(tmp_path, capsys):
    plant(tmp_path / "set", "a.png", groups_csv="patient;image\n")
    with pytest.raises(InputError, match="must have stem and group"):
        ownership(tmp_path / "set")
    ownership(tmp_path)  # somewhere below it is somebody else's
    assert "not used: " in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no masks there"):
        ownership(tmp_path, masks=tmp_path / "empty")


def test_several_sources_have_ids_from_what_they_share(tmp_path):
    plant(tmp_path, "one/a.png", "two/a.png")
    both = ownership(tmp_path / "one", tmp_path / "two" / "a.png")
    assert both.of([str(tmp_path / "two/a.png")], None).id == SALT.identify("file", "two/a.png")
    assert ownership(tmp_path / "two").of([str(tmp_path / "two/a.png")], None).id == SALT.identify("file", "a.png")


def test_channels_of_an_nnunet_case_are_one_patient_and_share_its_mask(tmp_path):
    plant(tmp_path, "imagesTr/c_0000.nii.gz", "imagesTr/c_0001.nii.gz", "imagesTr/d_0000.nii.gz", "labelsTr/c.nii.gz")
    owned = [
        ownership(tmp_path).of([str(tmp_path / "imagesTr" / f"{name}.nii.gz")], None) for name in ("c_0000", "c_0001", "d_0000")
    ]
    assert owned[0].group == owned[1].group != owned[2].group
    assert [one.mask for one in owned] == [str(tmp_path / "labelsTr" / "c.nii.gz")] * 2 + [None]


def test_the_last_number_of_a_uid_is_no_ending(tmp_path):
    plant(tmp_path, "1.2.3", "1.2.4", groups_csv="stem,group\n1.2.3,x\n1.2.4,y\n")
    owned = [ownership(tmp_path).of([str(tmp_path / name)], None).group for name in ("1.2.3", "1.2.4")]
    assert owned == [SALT.identify("group", name) for name in "xy"]


def test_a_patient_in_two_parts_is_refused():
    def owned(group, split):
        return f"{group}-{split}", Owned("", group, True, "", "", None, split)

    refuse_torn_groups([owned("a", "pool"), owned("a", "pool"), owned("b", "test"), owned("a", None)])
    with pytest.raises(InputError, match="a-val is in val, a-pool in pool"):
        refuse_torn_groups([owned("a", "pool"), owned("b", "val"), owned("a", "val")])
