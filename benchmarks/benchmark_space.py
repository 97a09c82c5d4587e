"""Time the Space: one picture against plain `pipeline()`, many at once, and its memory over many.

Without --model a ViT-B/16 at 224 px of random weights is taken: its speed is that of a trained one.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "space"), str(ROOT)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", help="a folder")
    parser.add_argument("--rounds", type=int, default=30, help="pictures timed one by one")
    parser.add_argument("--at_once", type=int, default=64, help="requests sent at the same time")
    parser.add_argument("--requests", type=int, default=2000, help="requests one after the other")
    parser.add_argument("--output", type=Path, help="a JSON file to write the figures to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or random_vit(Path(folder) / "vit-base")
        found = one_by_one(model, arguments.rounds)
        with running(model) as (space, pid):
            found |= at_once(space, arguments.at_once)
            found |= memory(space, pid, arguments.requests)
    print(json.dumps(found, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1))


def random_vit(folder: Path) -> str:
    """A ViT-B/16 at 224 px for ten classes, saved to `folder`."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(num_labels=10)).save_pretrained(folder)
    ViTImageProcessorPil().save_pretrained(folder)
    return str(folder)


def one_by_one(model: str, rounds: int) -> dict:
    """Milliseconds from an open picture to the answer with its maps, and by pipeline() in turn."""
    from transformers import pipeline

    import inference
    from pipeline import environment

    started = time.perf_counter()
    classifier = inference.Classifier(model)
    opening = time.perf_counter() - started
    classify = pipeline("image-classification", model=model)
    images = [inference.open_picture(path) for path in inference.EXAMPLES]
    ours, plain = in_turn(classifier.answer, classify, images, rounds)
    relevance = []
    for image in images[:5]:
        answer = classifier.answer(image)
        started = time.perf_counter()
        classifier.map(answer, "relevance")
        relevance.append(1000 * (time.perf_counter() - started))
    return {
        "hardware": environment.hardware(),
        "precision": classifier.precision,
        "open_s": round(opening, 2),
        "classify_and_explain_ms": spread(ours),
        "plain_pipeline_ms": spread(plain),
        "relevance_ms": spread(relevance),
    }


def in_turn(ours, plain, images: list, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of `rounds` calls of each on one image, in turn, after three uncounted ones."""
    times = ([], [])
    for i in range(rounds + 3):
        for call, found in zip((ours, plain), times, strict=True):
            started = time.perf_counter()
            call(images[i % len(images)])
            found.append(1000 * (time.perf_counter() - started))
    return times[0][3:], times[1][3:]


@contextmanager
def running(model: str) -> Iterator[tuple[str, int]]:
    """A Space of this model in a process of its own: its address and process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, command = f"http://127.0.0.1:{port}", [sys.executable, ROOT / "space/app.py"]
    variables = os.environ | {"MODEL_ID": model, "GRADIO_SERVER_PORT": str(port)}
    process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(url).close()
                break
            except OSError:
                time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def at_once(space: str, count: int) -> dict:
    """Seconds until each of `count` requests is answered, and whether in order of arrival."""
    path, done, lock = upload(space), [], threading.Lock()
    events = [join(space, path) for _ in range(count)]
    started = time.perf_counter()

    def wait(number: int) -> None:
        answered = result(space, events[number])
        with lock:
            done.append((time.perf_counter() - started, number, answered))

    threads = [threading.Thread(target=wait, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = sorted(s for s, _, _ in done)
    order = [number for _, number, _ in sorted(done)]
    # The replies of neighbours may overtake each other on their way, by a place or two.
    moved = max(abs(place - number) for place, number in enumerate(order))
    return {
        "at_once": count,
        "answered": sum(answered for *_, answered in done),
        "places_out_of_order": moved,
        "at_once_p50_s": round(statistics.median(seconds), 2),
        "at_once_p95_s": round(seconds[int(0.95 * (count - 1))], 2),
    }


def memory(space: str, pid: int, count: int) -> dict:
    """The process's resident memory in MB after each tenth of `count` requests."""
    path, found, times = upload(space), [], []
    for i in range(count):
        started = time.perf_counter()
        if not result(space, join(space, path)):
            sys.exit(f"Request {i} was not answered.")
        times.append(1000 * (time.perf_counter() - started))
        if (i + 1) % max(count // 10, 1) == 0:
            found.append(resident(pid))
    return {"requests": count, "request_ms": spread(times), "resident_mb": found}


def upload(space: str) -> str:
    import inference

    border, picture = uuid.uuid4().hex, inference.EXAMPLES[0]
    head = f'--{border}\r\nContent-Disposition: form-data; name="files"; filename="picture.png"'
    body = f"{head}\r\n\r\n".encode() + picture.read_bytes() + f"\r\n--{border}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={border}"}
    return json.loads(ask(f"{space}/gradio_api/upload", body, headers))[0]


def join(space: str, path: str) -> str:
    """Put a request for /explain in the line; returns its event."""
    picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [picture, "rollout", -1, 0, ""]}).encode()
    address = f"{space}/gradio_api/call/explain"
    return json.loads(ask(address, body, {"Content-Type": "application/json"}))["event_id"]


def result(space: str, event: str) -> bool:
    """Wait for an event; whether it was answered."""
    return b"event: complete" in ask(f"{space}/gradio_api/call/explain/{event}")


def ask(address: str, body: bytes | None = None, headers: dict | None = None) -> bytes:
    request = urllib.request.Request(address, body, headers or {})
    with urllib.request.urlopen(request, timeout=600) as reply:
        return reply.read()


def resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) // 1024
    return 0


def spread(values: list[float]) -> dict:
    values = sorted(values)
    return {
        "p50": round(statistics.median(values), 1),
        "p95": round(values[int(0.95 * (len(values) - 1))], 1),
        "least": round(values[0], 1),
    }


if __name__ == "__main__":
    main()
