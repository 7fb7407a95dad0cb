"""The driver of the book on tiny books: what fails a build, what is executed again, what a page may not show."""

import base64
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import build
import chapters
import execute
import nbformat
import psutil
import pytest
import torch
import yaml
from chapters import BookError, Runner
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image, ImageChops
from pictures import MOST_ERROR, smaller

ROOT = Path(__file__).parent.parent
PARAMETERS = {"device": "cpu", "preset": "default", "threads": 1}


def notebook(*cells, after=None, **wishes):
    """A notebook with a title, the parameters of every chapter and ``cells``: source, or source and tag."""
    made = [new_markdown_cell("# Chapter"), new_code_cell('device = "cpu"\npreset = "default"\nthreads = 1')]
    made[1].metadata["tags"] = ["parameters"]
    for cell in cells:
        source, tags = (cell, []) if isinstance(cell, str) else (cell[0], [cell[1]])
        made.append(new_code_cell(source, metadata={"tags": tags}))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    found = new_notebook(cells=made, metadata={"kernelspec": kernel})
    if after or wishes:
        found.metadata["sparsesurvey"] = {**({"after": after} if after else {}), **wishes}
    return found


@pytest.fixture
def book(tmp_path):
    """Writes a book of notebooks, ``book(a=notebook(...))``, and returns its folder."""

    def write(**notebooks):
        for folder in ("notebooks", "sparsesurvey", "book"):
            (tmp_path / folder).mkdir(exist_ok=True)
        for name, content in notebooks.items():
            nbformat.write(content, tmp_path / "notebooks" / f"{name}.ipynb")
        (tmp_path / "book" / "index.md").write_text("# Tiny\n\n<!-- state of the build -->\n")
        (tmp_path / "sparsesurvey" / "code.py").write_text("x = 1\n")
        toc = {"format": "jb-book", "root": "book/index", "chapters": [{"file": f"notebooks/{n}"} for n in notebooks]}
        (tmp_path / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False))
        return tmp_path

    return write


def run(root, limit=60.0, **parameters):
    """Execute the book's chapters: ``{name: outcome}``."""
    runner = Runner(root, root / "_build", {**PARAMETERS, **parameters}, limit=limit)
    return {outcome.chapter.name: outcome for outcome in runner.all(chapters.chapters(root))}


def executed(root, name):
    return nbformat.read(root / "_build" / "stage" / "notebooks" / f"{name}.ipynb", as_version=4)


def outputs(root, name):
    return [output for cell in executed(root, name).cells for output in cell.get("outputs", [])]


def test_error_names_chapter_cell_and_message_and_stops_only_what_waits_for_it(book):
    root = book(bad=notebook("x = 1", "raise ValueError('boom')"), good=notebook("print(6 * 7)"),
                late=notebook("print(1)", after=["bad"]))
    found = run(root)
    assert "cell 3" in found["bad"].error and "ValueError: boom" in found["bad"].error
    assert found["late"].error == "not executed: waits for bad"
    assert not found["good"].error and outputs(root, "good")[0].text == "42\n"
    assert not (root / "_build/stage/notebooks/bad.ipynb").exists()


def test_time_limit_is_for_the_chapter_and_names_the_cell(book):
    root = book(slow=notebook("import time; time.sleep(2)", "time.sleep(300)  # too long"),
                dead=notebook("import os; os._exit(3)"))
    start = time.monotonic()
    found = run(root, limit=5)
    assert "limit of 5 s" in found["slow"].error and "# too long" in found["slow"].error
    assert "kernel died" in found["dead"].error and "os._exit" in found["dead"].error
    assert time.monotonic() - start < 60
    assert not list((root / "_build/stage").rglob("*.ipynb"))


def test_unknown_parameter_fails(book):
    root = book(a=notebook("print(1)"))
    message = "unknown parameter 'speed'; the notebook has: device, preset, threads"
    with pytest.raises(execute.ChapterError, match=message):
        execute.changed(root / "notebooks/a.ipynb", {"speed": 3})
    options = build.arguments(["--root", str(root), "-p", "speed", "3"])
    with pytest.raises(BookError, match="unknown parameter 'speed'"):
        build.build(options)


def test_what_is_no_notebook_is_refused(book):
    root = book(a=notebook("print(1)"))
    (root / "notebooks/a.ipynb").write_text("print(1)")
    with pytest.raises(BookError, match="a.ipynb is no notebook"):
        chapters.chapters(root)
    made = notebook("print(1)")
    made.cells[1].source = "device := cpu"
    nbformat.write(made, root / "notebooks/a.ipynb")
    with pytest.raises(execute.ChapterError, match="a.ipynb is not a notebook of Python"):
        chapters.chapters(root)


def test_a_parameter_that_is_no_literal_is_refused(book):
    root = book(a=notebook("print(1)"))
    made = notebook("print(1)")
    made.cells[1].source = "device = str(1)"
    nbformat.write(made, root / "notebooks/a.ipynb")
    with pytest.raises(execute.ChapterError, match=r"a parameter must be name = literal, not device = str\(1\)"):
        chapters.chapters(root)


def test_parameters_reach_the_chapter_and_defaults_leave_no_trace(book):
    root = book(a=notebook("print(preset, threads)"))
    run(root)
    code = [cell for cell in executed(root, "a").cells if cell.cell_type == "code"]
    assert [cell.metadata.get("tags") for cell in code] == [["parameters"], []]
    run(root, preset="full", threads=2)
    assert outputs(root, "a")[0].text == "full 2\n"
    injected = [cell for cell in executed(root, "a").cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert len(injected) == 1 and "hide-input" in injected[0].metadata.tags and "device" not in injected[0].source


def test_unchanged_chapter_is_not_executed_again(book):
    root = book(a=notebook("print(1)"), b=notebook("print(2)"))
    first = run(root)
    assert not any(outcome.cached for outcome in first.values())
    again = run(root)
    assert all(outcome.cached for outcome in again.values())
    assert again["a"].report == first["a"].report
    nbformat.write(notebook("print(3)"), root / "notebooks/a.ipynb")
    third = run(root)
    assert not third["a"].cached and third["b"].cached


@pytest.mark.parametrize("path", ["sparsesurvey/code.py", "sparsesurvey/explorer.js", "sparsesurvey/recorded/m/a.jsonl",
                                  "constraints.txt", "pyproject.toml"])
def test_the_key_covers_library_rows_and_lock(book, path):
    root = book(a=notebook("print(1)"))
    before = chapters.foundation(root)
    assert chapters.foundation(root) == before
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text("something else\n")
    assert chapters.foundation(root) != before


def test_the_key_covers_parameters_that_the_chapter_has(book, tmp_path):
    chapter = chapters.chapters(book(a=notebook("print(1)")))[0]
    cases = [({}, "b", []), ({"threads": 2}, "b", []), ({}, "c", []), ({}, "b", ["key"])]
    assert len({chapters.key(chapter, given, base, tmp_path, waited) for given, base, waited in cases}) == 4
    runner = Runner(tmp_path, tmp_path / "_build", {**PARAMETERS, "other": 1})
    assert runner.given(chapter) == PARAMETERS


def test_a_chapter_after_all_sees_the_rows_of_all_and_is_executed_again_when_they_change(book):
    write = "import os, pathlib\npath = pathlib.Path(os.environ['SPARSESURVEY_ROWS'], 'machine', 'a.jsonl')\n"
    write += "path.parent.mkdir(exist_ok=True, parents=True)\npath.write_text('{}')"
    read = "import os, pathlib\nfolder = pathlib.Path(os.environ['SPARSESURVEY_ROWS'])\n"
    read += "print(sorted(path.name for path in folder.rglob('*.jsonl')))"
    root = book(board=notebook(read, after="all"), a=notebook(write))
    run(root)
    assert outputs(root, "board")[0].text == "['a.jsonl']\n"
    assert all(outcome.cached for outcome in run(root).values())
    (root / "_build/rows/machine/a.jsonl").write_text("{}\n{}")
    found = run(root)
    assert found["a"].cached and not found["board"].cached
    (root / "_build/rows/machine/board.jsonl").write_text("{}")
    assert run(root)["board"].cached, "a chapter's own rows must not make it run again"


def test_chapters_that_add_rows_to_one_they_wait_for_are_not_executed_again(book):
    """Each structure's chapter prunes the model of the training chapter and records that beside its losses."""
    add = "import os, pathlib\nfolder = pathlib.Path(os.environ['SPARSESURVEY_ROWS'], 'm')\n"
    add += "folder.mkdir(exist_ok=True, parents=True)\nprint('{}', file=(folder / 'a.jsonl').open('a'))"
    root = book(a=notebook(add), b=notebook(add, after=["a"]), c=notebook(add, after=["a"]))
    assert not any(outcome.cached for outcome in run(root).values())
    assert all(outcome.cached for outcome in run(root).values())
    nbformat.write(notebook(add, "print(1)"), root / "notebooks/a.ipynb")
    assert not any(outcome.cached for outcome in run(root).values()), "what they wait for was executed again"


def test_nothing_is_executed_beside_a_chapter_that_runs_alone(book):
    show = "import os, pathlib, time\nmark = pathlib.Path(os.environ['SPARSESURVEY_ROWS']).parent / 'NAME.running'\n"
    show += "mark.touch()\ntime.sleep(1)\nprint(sorted(path.stem for path in mark.parent.glob('*.running')))\nmark.unlink()"
    cells = {name: show.replace("NAME", name) for name in "abcd"}
    root = book(a=notebook(cells["a"]), b=notebook(cells["b"], after=["a"], alone=True), c=notebook(cells["c"]),
                d=notebook(cells["d"], alone=True))
    assert not any(outcome.error for outcome in run(root).values())
    assert [outputs(root, name)[0].text for name in "bd"] == ["['b']\n", "['d']\n"]


def test_alone_is_true_or_false(book):
    root = book(a=notebook("print(1)", alone="yes"))
    with pytest.raises(BookError, match="a.ipynb: alone must be true or false, got 'yes'"):
        chapters.chapters(root)


def test_a_failed_chapter_leaves_the_last_executed_one_as_it_was(book):
    root = book(a=notebook("print(1)"))
    run(root)
    target = root / "_build/stage/notebooks/a.ipynb"
    before = target.read_bytes()
    nbformat.write(notebook("raise SystemError"), root / "notebooks/a.ipynb")
    assert run(root)["a"].error
    assert target.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["a.ipynb"]


def test_an_interrupted_write_leaves_the_target_as_it_was(tmp_path, monkeypatch):
    target = tmp_path / "a.ipynb"
    execute.write(notebook("x = 1"), target)
    before = target.read_bytes()

    def torn(content, path):
        path.write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(nbformat, "write", torn)
    with pytest.raises(KeyboardInterrupt):
        execute.write(notebook("x = 2"), target)
    assert target.read_bytes() == before


def test_what_must_not_be_published_fails_the_chapter(book):
    root = book(
        path=notebook("import os; print(os.environ['SPARSESURVEY_ROWS'])"),
        error=notebook(("1 / 0", "raises-exception")),
        dead=notebook("import ipywidgets\nipywidgets.interact(lambda x: print(x), x=3);"),
    )
    found = run(root)
    assert "shows a path of this machine" in found["path"].error
    assert "ZeroDivisionError" in found["error"].error
    assert "does nothing without a kernel" in found["dead"].error


def test_progress_bars_and_live_controls_are_not_published(book):
    bars = "import sys\nfrom tqdm import tqdm\nfrom tqdm.notebook import tqdm as bar"
    root = book(a=notebook(
        bars, "for i in tqdm(range(3), disable=False): pass\nprint('kept', file=sys.stderr)",
        "for i in bar(range(3), disable=False): pass",
        ("import ipywidgets\nipywidgets.interact(lambda x: print(x), x=3);", "live-only"),
    ))
    assert not run(root)["a"].error
    found = outputs(root, "a")
    assert [output.get("text") for output in found if output.output_type == "stream"] == ["kept\n"]
    assert [output.data["text/markdown"] for output in found if "data" in output] == [execute.LIVE_NOTE]
    assert "FloatProgress" not in json.dumps(executed(root, "a").metadata)


def png(image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def pixels(picture: str):
    return Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGBA")


def test_figures_get_smaller_and_look_the_same():
    ramp = Image.linear_gradient("L").resize((400, 400))
    soft = Image.merge("RGBA", [ramp, ramp.rotate(90), Image.new("L", ramp.size, 40), Image.new("L", ramp.size, 255)])
    noise = Image.frombytes("L", (200, 200), random.Random(0).randbytes(40_000)).convert("RGBA")
    for image in (noise, soft):
        before = png(image)
        after = smaller(before)
        assert len(after) < len(before)
        error = ImageChops.difference(pixels(before).convert("RGB"), pixels(after).convert("RGB"))
        assert max(high for _, high in error.getextrema()) <= MOST_ERROR


def test_transparent_figures_keep_every_pixel():
    image = Image.linear_gradient("L").convert("RGBA")
    image.putalpha(Image.radial_gradient("L"))
    assert list(pixels(smaller(png(image))).tobytes()) == list(image.tobytes())


def test_widgets_that_work_without_a_kernel_are_published(book):
    source = "import ipywidgets as w\na, b = w.IntSlider(3), w.IntText(3)\n"
    source += "w.jslink((a, 'value'), (b, 'value'))\nw.VBox([a, b])"
    root = book(a=notebook(source))
    assert not run(root)["a"].error
    assert execute.VIEW in outputs(root, "a")[0].data
    assert executed(root, "a").metadata.widgets[execute.STATE]["state"]


def test_no_private_text_is_left_in_the_executed_notebook(book):
    root = book(a=notebook("print(1)"))
    run(root)
    made = executed(root, "a")
    assert "papermill" not in json.dumps(made) and str(root) not in json.dumps(made)
    assert set(made.metadata.sparsesurvey.build) == {"key", "executed", "seconds", "peak_mib", "parameters"}


@pytest.mark.parametrize("toc, message", [
    ({"chapters": [{"file": "notebooks/none"}]}, "names notebooks/none, but there is no"),
    ({"chapters": [{"glob": "notebooks/*"}]}, "a glob has no reading order"),
    ({"chapters": "x"}, "_toc.yml"),
])
def test_table_of_contents_is_checked(book, toc, message):
    root = book(a=notebook("print(1)"))
    (root / "_toc.yml").write_text(yaml.safe_dump({"format": "jb-book", "root": "book/index", **toc}))
    with pytest.raises(BookError, match=message):
        chapters.pages(root)


@pytest.mark.parametrize("after, message", [
    ({"a": ["c"]}, "no such chapter"),
    ({"a": ["b"], "b": ["a"]}, "wait for each other: a, b"),
    ({"a": ["a"]}, "wait for each other: a"),
])
def test_what_chapters_wait_for_is_checked(book, after, message):
    root = book(**{name: notebook("print(1)", after=after.get(name)) for name in ("a", "b")})
    with pytest.raises(BookError, match=message):
        chapters.chapters(root)


def test_the_chapters_of_this_repository_can_be_ordered():
    found = [chapter.page for chapter in chapters.chapters(ROOT)]
    assert found == [page for page in chapters.pages(ROOT) if page.startswith("notebooks/")]


@pytest.mark.parametrize("words", [["--device", "tpu"], ["--preset", "huge"], ["--threads", "0"], ["--jobs", "-1"],
                                   ["--timeout", "0"], ["--threads", "two"]])
def test_bad_arguments_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        build.arguments(words)
    assert words[0] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_at_once(book, capsys):
    assert build.main(["--root", str(book(a=notebook("print(1)"))), "--device", "cuda"]) == 1
    said = capsys.readouterr()
    assert "sees no GPU here" in said.err and "executing" not in said.out


def test_a_gpu_and_many_threads_get_one_chapter_at_a_time():
    assert build.jobs(build.arguments(["--device", "cuda"])) == 1
    assert build.jobs(build.arguments(["--threads", "1000"])) == 1
    assert build.jobs(build.arguments(["--threads", "1000", "--jobs", "3"])) == 3


def test_stage_mirrors_the_sources_and_keeps_the_times_of_what_did_not_change(book):
    root = book(a=notebook("print(1)"))
    (root / "_config.yml").write_text("title: Tiny\nexecute: {execute_notebooks: force}\n")
    (root / "book" / "old.md").write_text("# Old\n")
    target, toc = root / "_build" / "stage", chapters.pages(root)
    build.stage(root, target, toc, {"book/index.md": "# Tiny\n\nbuilt\n"})
    assert yaml.safe_load((target / "_config.yml").read_text())["execute"]["execute_notebooks"] == "off"
    assert (target / "book/index.md").read_text() == "# Tiny\n\nbuilt\n"
    times = {path: path.stat().st_mtime_ns for path in target.rglob("*") if path.is_file()}
    (root / "book" / "old.md").unlink()
    (root / "book" / "new.md").write_text("# New\n")
    build.stage(root, target, toc, {"book/index.md": "# Tiny\n\nbuilt\n"})
    after = {path: path.stat().st_mtime_ns for path in target.rglob("*") if path.is_file()}
    assert after == {**{path: at for path, at in times.items() if path.name != "old.md"},
                     target / "book/new.md": after[target / "book/new.md"]}


def drive(root, *words):
    command = [sys.executable, str(ROOT / "book" / "build.py"), "--root", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_an_interrupted_build_leaves_no_process_behind(book, how):
    source = "import os, subprocess, sys, time\n"
    source += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    source += "print(os.getpid(), child.pid, file=open('part', 'w'), flush=True)\n"
    source += "os.rename('part', 'pids')\ntime.sleep(600)"
    root = book(a=notebook(source))
    command = [sys.executable, str(ROOT / "book" / "build.py"), "--root", str(root)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    pids = root / "_build" / "work" / "a" / "pids"
    try:
        assert soon(pids.exists, 60)
        driver.send_signal(how)
        driver.wait(30)
    finally:
        driver.kill()
    started = [int(pid) for pid in pids.read_text().split()]
    assert soon(lambda: not any(runs(pid) for pid in started), 20)


def soon(true, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.1)
    return true()


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_book_end_to_end(book):
    """A whole build; a warning fails it, and fails it again though Sphinx would not read that page a second time."""
    root = book(a=notebook("print(6 * 7)"))
    shutil.copy(ROOT / "_config.yml", root)
    for name in ("_assets", "_extensions"):
        shutil.copytree(ROOT / "book" / name, root / "book" / name)
    shutil.copy(ROOT / "book" / "references.bib", root / "book")
    for name in ("bibliography.md", "status.md"):
        shutil.copy(ROOT / "book" / name, root / "book")
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    toc["chapters"] += [{"file": "book/status"}, {"file": "book/bibliography"}]
    (root / "_toc.yml").write_text(yaml.safe_dump(toc))
    index = root / "book" / "index.md"
    sound = index.read_text()
    index.write_text(sound + "\n{cite}`nobody1900`\n")
    for _ in range(2):
        done = drive(root)
        assert done.returncode == 1 and "nobody1900" in done.stderr and "The book was not built." in done.stderr
    index.write_text(sound)
    done = drive(root)
    assert done.returncode == 0, done.stderr
    assert "unchanged" in done.stdout
    page = (root / "_build/html/notebooks/a.html").read_text()
    assert "42" in page
    assert "Built 20" in (root / "_build/html/book/index.html").read_text()
    assert (root / "_build/html/index.html").is_file()
