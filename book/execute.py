"""Execute one chapter with papermill, clean what it printed and refuse what must not be published.

The driver starts this file once per chapter, ``python book/execute.py job.json``, so that a chapter cannot harm
another one. The last line of standard output is a JSON report. The executed notebook appears at ``target`` in one
rename, and only if every gate let it pass: papermill warns about unknown parameters, writes notebooks that time-outs
cut short, and jupyter-book publishes tracebacks, all with exit code 0.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import resource
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pictures import smaller

STATE = "application/vnd.jupyter.widget-state+json"
VIEW = "application/vnd.jupyter.widget-view+json"
BAR = re.compile(r"\r|\d+%\||\d+it \[")
LIVE_NOTE = (
    "*Live: this control needs a running kernel. Download the notebook (the arrow at the top of the page) and run the "
    "cell in JupyterLab.*"
)


class ChapterError(Exception):
    """A chapter that must not be published; the message names the cell and the reason."""


def defaults(notebook: Path) -> dict[str, Any]:
    """The parameters of a notebook and their default values, which must be literals.

    Read from the cell itself: papermill's own inspection overlooks some comments.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
        lines = ast.parse("\n".join("".join(cell["source"]) for cell in tagged)).body
    except (ValueError, KeyError, TypeError, SyntaxError) as error:
        raise ChapterError(f"{notebook.name} is not a notebook of Python: {error!r}")
    found = {}
    for line in lines:
        try:
            found[line.targets[0].id] = ast.literal_eval(line.value)
        except (ValueError, AttributeError):
            raise ChapterError(f"{notebook.name}: a parameter must be name = literal, not {ast.unparse(line)}")
    return found


def changed(notebook: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters that differ from the notebook's defaults; ChapterError for one that it does not have."""
    known = defaults(notebook)
    for name in parameters:
        if name not in known:
            raise ChapterError(f"unknown parameter {name!r}; the notebook has: {', '.join(known) or 'none'}")
    return {name: value for name, value in parameters.items() if value != known[name]}


class Clock:
    """Gives each cell what is left of the chapter's time limit, and knows which cell ran last."""

    def __init__(self, limit: float) -> None:
        self.end, self.cell = time.monotonic() + limit, None

    def __call__(self, cell: Any) -> int:
        self.cell = cell
        return max(1, round(self.end - time.monotonic()))


def first_line(cell: Any) -> str:
    return next(iter(cell.source.strip().splitlines()), "") if cell else "no cell"


def run(source: Path, scratch: Path, parameters: dict[str, Any], limit: float, cwd: Path) -> Any:
    """Execute ``source`` within ``limit`` seconds and return the notebook; ChapterError names cell and message."""
    sys.modules["rfc3987_syntax"] = None  # jsonschema asks for it to check addresses: two seconds a chapter for nothing here
    import nbformat
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    clock = Clock(limit)
    try:
        papermill.execute_notebook(
            str(source), str(scratch), parameters=parameters, cwd=str(cwd), kernel_name="python3",
            progress_bar=False, start_timeout=120, timeout_func=clock,
        )
    except papermill.PapermillExecutionError as error:
        raise ChapterError(f"cell {error.cell_index} ({first_line(clock.cell)}): {error.ename}: {error.evalue}")
    except CellTimeoutError:
        raise ChapterError(f"the limit of {limit:g} s was reached in the cell that begins: {first_line(clock.cell)}")
    except DeadKernelError:
        raise ChapterError(f"the kernel died in the cell that begins: {first_line(clock.cell)}")
    return nbformat.read(scratch, as_version=4)


def tree(state: dict[str, Any], model: str) -> set[str]:
    """A widget model and the models it is made of."""
    found, todo = set(), [model]
    while todo:
        model = todo.pop()
        if model in state and model not in found:
            found.add(model)
            todo += re.findall(r"IPY_MODEL_(\w+)", json.dumps(state[model]["state"]))
    return found


def kinds(state: dict[str, Any], models: set[str]) -> set[str]:
    """What these models are: their names and the classes that mark them in the page."""
    names = {state[model]["model_name"] for model in models}
    return names.union(*(state[model]["state"].get("_dom_classes", ()) for model in models))


def is_bar(state: dict[str, Any], model: str) -> bool:
    """Is this the box of label, bar and label that tqdm shows in a notebook?"""
    children = state.get(model, {}).get("state", {}).get("children", [])
    names = [state.get(child.removeprefix("IPY_MODEL_"), {}).get("model_name") for child in children]
    return names == ["HTMLModel", "FloatProgressModel", "HTMLModel"]


def tidy_outputs(cell: Any, state: dict[str, Any]) -> None:
    """Drop progress bars, and from cells tagged live-only the controls that would lie without a kernel.

    Figures are made smaller.
    """
    import nbformat

    kept, live = [], "live-only" in cell.metadata.get("tags", [])
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stderr":
            output.text = "\n".join(line for line in output.text.split("\n") if not BAR.search(line)).lstrip("\n")
            if not output.text.strip():
                continue
        model = output.get("data", {}).get(VIEW, {}).get("model_id")
        models = tree(state, model) if model else set()
        callback = kinds(state, models) & {"widget-interact", "OutputModel"}
        if callback and not live:
            raise ChapterError(
                f"the cell that begins {first_line(cell)!r} shows a control that does nothing without a kernel "
                "(interact); tag the cell live-only, or show an anywidget"
            )
        if callback or (model and is_bar(state, model)):
            for gone in models:
                del state[gone]
            continue
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = smaller(output.data["image/png"])
        kept.append(output)
    if live and len(kept) < len(cell.outputs):
        kept.append(nbformat.v4.new_output("display_data", data={"text/markdown": LIVE_NOTE, "text/plain": LIVE_NOTE}))
    cell.outputs = kept


def tidy(notebook: Any) -> None:
    """Strip what papermill and the kernel left behind that is not the chapter: times, paths, progress bars."""
    notebook.metadata.pop("papermill", None)
    state = notebook.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    for cell in notebook.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
        if cell.cell_type != "code":
            continue
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("hide-input")
        tidy_outputs(cell, state)
    if not state:
        notebook.metadata.pop("widgets", None)


def check(notebook: Any, private: list[str]) -> None:
    """Raise ChapterError for an error output, or for a text of ``private`` (absolute paths) anywhere."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                raise ChapterError(f"cell {number} ({first_line(cell)}): {output.ename}: {output.evalue}")
        text = json.dumps(cell)
        for path in private:
            if path in text:
                raise ChapterError(f"cell {number} ({first_line(cell)}) shows a path of this machine: {path}")


def write(notebook: Any, target: Path) -> None:
    """Write the executed notebook in one rename."""
    import nbformat

    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    nbformat.write(notebook, part)
    os.replace(part, target)


def execute(job: dict[str, Any]) -> dict[str, Any]:
    """Execute a job of the driver; returns what the status page prints about it."""
    source, target, scratch = Path(job["source"]), Path(job["target"]), Path(job["scratch"])
    scratch.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    parameters = changed(source, job["parameters"])
    notebook = run(source, scratch / "notebook.ipynb", parameters, job["limit"], scratch)
    tidy(notebook)
    check(notebook, job["private"])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**10 if sys.platform != "darwin" else 2**20)
    report = {
        "key": job["key"],
        "executed": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start, 1),
        "peak_mib": round(peak),
        "parameters": job["parameters"],
    }
    notebook.metadata.setdefault("sparsesurvey", {})["build"] = report
    write(notebook, target)
    return report


def descendants(pid: int) -> list[Any]:
    """The processes that a process started, and those that they started."""
    import psutil

    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill(processes: list[Any]) -> None:
    """End processes of ``descendants``; one that has ended by itself is passed over."""
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def end_with(parent: int) -> None:
    """End this process and its kernel when the driver is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(1)
    kill(descendants(os.getpid()))
    os._exit(1)


def main() -> int:
    threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        report = execute(job)
    except ChapterError as error:
        report = {"error": str(error)}
    print("\n" + json.dumps(report), flush=True)
    return 1 if "error" in report else 0


if __name__ == "__main__":
    sys.exit(main())
