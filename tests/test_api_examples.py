"""The examples of docs/api.md, run in their order as one program."""

import re
import shutil

from conftest import ROOT

import offline_kd as okd


def test_the_examples_of_the_api_page_run_as_they_stand(data_root, tmp_path, monkeypatch, capsys):
    (tmp_path / "digits").mkdir()
    for tar in (data_root / "digits").glob("train-*.tar"):
        shutil.copy(tar, tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/api.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) >= 5
    names: dict[str, object] = {"__name__": "__main__"}
    for number, example in enumerate(examples):
        exec(compile(example, f"docs/api.md, example {number}", "exec"), names)
    assert "has no sample 'no-such-key'" in capsys.readouterr().out


def test_the_api_page_names_everything_that_is_public():
    page = (ROOT / "docs/api.md").read_text()
    for name in okd.__all__:
        assert f"`okd.{name}" in page, name
    for name in vars(okd.TeacherStore):
        if not name.startswith("_") and name not in ("reader", "data"):
            assert re.search(rf"\b{name}\b", page), name
