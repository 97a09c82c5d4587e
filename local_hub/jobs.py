"""Jobs and buckets of the local Hub: recorded in `root/jobs` and `root/buckets`, but not run."""

import json
import secrets

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, StreamingResponse

from local_hub.repository import require

HARDWARE = {  # three machines of the real Hub, with their price in US dollars per minute
    "cpu-basic": ("2 vCPU", "16 GB", None, 0.000167),
    "t4-small": ("4 vCPU", "15 GB", "T4", 0.006667),
    "a10g-small": ("4 vCPU", "15 GB", "A10G", 0.016667),
}


def answer(call, method: str, *path: str) -> object:
    """Respond to `HfApi.run_job`, `fetch_job_logs` and `create_bucket`; `call` is an `app.Call`.

    To simulate a run, write a job's log to `<id>.log` and its final `status` in `<id>.json`.
    """
    match method, *path:
        case "GET", "jobs", "hardware":
            return [describe(name, *values) for name, values in HARDWARE.items()]
        case "POST", "jobs", owner:
            call.require_write(owner)
            body = call.json
            require(body.get("flavor") in HARDWARE, 400, f"There is no flavor {body.get('flavor')}")
            job = {"id": secrets.token_hex(12), "status": {"stage": "SCHEDULING"}, **body}
            job["owner"] = {"id": owner, "name": owner, "type": "user"}
            folder = call.hub.root / "jobs" / owner
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # a job contains a token
            (folder / f"{job['id']}.json").write_text(json.dumps(job, indent=1))
            return public(job)
        case "GET", "jobs", owner, job, *what:
            file = call.hub.root / "jobs" / owner / f"{job}.json"
            is_member = owner in (call.user["name"], *call.user["orgs"])
            require(is_member and job.isalnum() and file.is_file(), 404, "Job not found")
            if what != ["logs"]:
                return public(json.loads(file.read_text()))
            log = file.with_suffix(".log")
            lines = log.read_text().splitlines() if log.exists() else []
            events = [{"timestamp": "2000-01-01T00:00:00.000Z", "data": line} for line in lines]
            stream = (f"data: {json.dumps(event)}\n\n" for event in events)
            return StreamingResponse(stream, media_type="text/event-stream")
        case "POST", "buckets", owner, name:
            call.require_write(owner)
            folder = call.hub.root / "buckets" / owner / name
            if folder.is_dir():
                return JSONResponse({"error": "You already created this bucket"}, 409)
            folder.mkdir(parents=True)
            return {"url": f"/buckets/{owner}/{name}"}
    raise HTTPException(404, "Not found")


def describe(name: str, cpu: str, ram: str, model: str | None, price: float) -> dict:
    gpu = {"type": "gpu", "model": model, "quantity": "1", "vram": "", "manufacturer": ""}
    cost = {"unitCostMicroUSD": round(price * 1e6), "unitCostUSD": price, "unitLabel": "minute"}
    hardware = {"name": name, "prettyName": name, "cpu": cpu, "ram": ram}
    return hardware | {"accelerator": gpu if model else None} | cost


def public(job: dict) -> dict:
    return job | {"secrets": dict.fromkeys(job.get("secrets") or {})}
