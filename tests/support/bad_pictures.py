"""Files that the Space must not accept."""

import struct
import zlib
from pathlib import Path

from samples import draw_image


def png_header(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes that claims this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def write_bad_pictures(folder: Path) -> dict[Path, str]:
    """Write such files; return the message that each one leads to, by path."""
    (folder / "text.png").write_text("This is no picture.")
    (folder / "page.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "empty.jpg").touch()
    draw_image(0, (64, 64)).save(folder / "cut.jpg")
    whole = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    draw_image(0, (1, 1)).save(folder / "dot.png")
    draw_image(0, (1, 5000)).save(folder / "line.png")
    (folder / "large.png").write_bytes(png_header(8000, 8000))
    (folder / "bomb.png").write_bytes(png_header(60000, 60000))
    messages = {
        "text.png": "not a picture in JPEG",
        "page.svg": "not a picture in JPEG",
        "script.eps": "not a picture in JPEG",
        "empty.jpg": "not a picture in JPEG",
        "cut.jpg": "damaged or incomplete",
        "dot.png": "at least 8 pixels",
        "line.png": "at least 8 pixels",
        "large.png": "more than 50 megapixels",
        "bomb.png": "more than 50 megapixels",
    }
    return {folder / name: message for name, message in messages.items()}
