"""The page and the endpoints of the Space: classify a picture and show the model's attention."""

import os
import time
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import gradio as gr
from gradio.processing_utils import get_upload_folder, is_in_or_equal, save_pil_to_cache
from gradio_client.utils import is_file_obj_with_meta, traverse

import wording
from inference import MAX_BYTES, MAX_SHOWN, Classifier, UserError, attention
from loading import choose_model

FILE = {"path": "cat.png", "url": "cat.png", "meta": {"_type": "gradio.FileData"}}  # for snippets
RELOAD = '<meta http-equiv="refresh" content="30">'  # seconds, while there is no model
TOGETHER = {"concurrency_id": "pictures", "concurrency_limit": 16}  # for decoding, not the model


class Page(gr.Blocks):
    """Blocks that accept only uploaded files; Gradio itself would download any URL."""

    def validate_inputs(self, block_fn, inputs):
        try:
            super().validate_inputs(block_fn, inputs)
        except ValueError:
            raise UserError("The inputs do not match the description on the API page.") from None
        inputs[:] = traverse(inputs, uploaded, is_file_obj_with_meta)


def uploaded(file: dict | None) -> dict:
    """Return the path of an uploaded file in a dict; UserError for anything else."""
    if file is None:
        raise UserError("Upload a picture or choose an example.")
    path = str(file.get("path")) if isinstance(file, dict) else ""
    path = path.rpartition("/gradio_api/file=")[2]  # an MCP client sends the upload's URL
    if "\0" in path or not is_in_or_equal(path, get_upload_folder()):
        raise UserError("Upload the picture as a file: URLs and paths are not accepted.")
    return FILE | {"path": path}


def build(classifier: Classifier) -> gr.Blocks:
    """Build the page for a classifier, with its endpoints."""
    dataset = Path(classifier.results["dataset"]["name"]).name if classifier.results else "image"
    title = f"{wording.DATASETS.get(dataset, dataset.capitalize())} classifier with attention maps"
    with Page(title=title, delete_cache=(3600, 3600), analytics_enabled=False) as demo:
        gr.Markdown(f"# {title}\n\n{wording.render('header.md', classifier)}")
        add_components(demo, classifier)
        gr.Markdown(wording.render("footer.md", classifier))
        add_endpoints(demo, classifier)
    return demo.queue(max_size=256, api_open=False)


def add_components(demo: gr.Blocks, classifier: Classifier) -> None:
    """Lay out the page and connect its events."""
    examples, config = classifier.examples, classifier.model.config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    gallery = {"allow_preview": False, "interactive": False, "buttons": []}
    with gr.Row():
        with gr.Column(min_width=320):
            picture = gr.Image(
                examples[0] if examples else None, type="filepath", label="Picture", height=300,
                buttons=["fullscreen"], alt_text="The picture to classify", elem_id="picture",
            )  # fmt: skip
            verdict = gr.HTML(elem_id="verdict")
            samples = gr.Gallery(
                [(path, path.stem) for path in examples], label="Examples", columns=4,
                visible=bool(examples), elem_id="examples", **gallery,
            )  # fmt: skip
            bars = gr.Label(label="Confidence", show_heading=False)
            with gr.Accordion("More classes", open=False, visible=len(classifier.labels) > 5):
                more = gr.Label(num_top_classes=25, show_label=False, show_heading=False)
        with gr.Column(min_width=320):
            overlay = gr.Image(label="Attention", buttons=["fullscreen"], elem_id="map")
            caption = gr.HTML(elem_id="caption")
            names = [(name, method) for method, (name, _) in wording.METHODS.items()]
            method = gr.Radio(names, value=classifier.best_method(), label="Map")
            layer = gr.Slider(0, layers - 1, layers - 1, step=1, label="Layer", buttons=[])
            head = gr.Slider(0, heads - 1, 0, step=1, label="Head", visible=False, buttons=[])
            classes = [("Predicted class", ""), *classifier.labels]
            label = gr.Dropdown(classes, value="", label="Class", visible=False)
            opacity = gr.Slider(0, 1, 0.8, step=0.05, label="Opacity of the map", buttons=[])
    tiles = gr.Gallery(label="All layers", columns=6, elem_id="layers", **gallery)

    def show(file, method, layer, head, label, opacity):
        """Compute everything on the page from only the picture and the controls."""
        visible = [gr.update(visible=method in methods) for methods in wording.CONTROL_METHODS]
        try:
            prediction = classifier.predict_file(uploaded(file)["path"])
            values = classifier.select_map(prediction, method, layer, head, label)
        except UserError as error:
            return wording.STATUS.format(escape(error.message)), None, None, None, "", [], *visible
        means = [classifier.select_map(prediction, "mean", number) for number in range(layers)]
        small = [attention.overlay(prediction.picture, mean, 160, opacity or 0) for mean in means]
        image = attention.overlay(prediction.picture, values, MAX_SHOWN, opacity or 0)
        label = label or next(iter(prediction.probs))
        text = wording.METHODS[method][1].format(layer=layer, head=head, label=label)
        bars = [(name, min(p, 0.994)) for name, p in prediction.probs.items()]  # at most 99 %
        return (
            wording.STATUS.format(escape(wording.answer(classifier, prediction))),
            dict(bars[:5]), dict(bars[5:]), gr.Image(image, alt_text=text),
            f'{escape(text)}<div class="scale">least <i></i> most</div>',
            [(tile, f"Layer {number}") for number, tile in enumerate(small)], *visible,
        )  # fmt: skip

    def choose_example(event: gr.SelectData):
        return examples[event.index]

    def choose_layer(event: gr.SelectData):
        return event.index

    # A single event, so that the page shows the latest of several quick actions.
    controls = [method, layer, head, label, opacity]
    latest = {"trigger_mode": "always_last", "api_visibility": "private"}
    gr.on(
        [demo.load, picture.change, *(control.change for control in controls)], show,
        [picture, *controls], [verdict, bars, more, overlay, caption, tiles, layer, head, label],
        preprocess=False, show_progress="minimal", **latest, **TOGETHER,
    )  # fmt: skip
    samples.select(choose_example, None, picture, queue=False, **latest)
    # One control after the other: two changes at once would trigger the event twice.
    chosen = tiles.select(choose_layer, None, layer, queue=False, **latest)
    chosen.then(lambda m: m if m == "head" else "mean", method, method, queue=False, **latest)


def add_endpoints(demo: gr.Blocks, classifier: Classifier) -> None:
    """Add the API endpoints /classify and /explain, which are also tools of the MCP server."""

    def classify(image: gr.FileData) -> tuple[dict[str, float], str]:
        """Return the probability of each class, and a warning if the picture fits none of them.

        Args:
            image: An uploaded picture or a data: URL; other URLs are not fetched.
        """
        prediction = classifier.predict_file(uploaded(image)["path"])
        return prediction.probs, wording.OOD if classifier.is_ood(prediction) else ""

    def explain(
        image: gr.FileData, method: Literal[attention.METHODS] = "mean", layer: int = -1,
        head: int = 0, label: str = "",
    ) -> tuple[gr.FileData, list[list[float]], dict[str, float]]:  # fmt: skip
        """Return the map overlaid on the picture, the map's rows of values, and the probabilities.

        Args:
            image: An uploaded picture or a data: URL; other URLs are not fetched.
            method: The mean of a layer's heads, one head, attention rollout or class relevance.
            layer: The layer, from 0, or from -1 backward.
            head: The head, from 0.
            label: The class to explain with relevance; by default the predicted class.
        """
        prediction = classifier.predict_file(uploaded(image)["path"])
        values = classifier.select_map(prediction, method, layer, head, label)
        overlay = attention.overlay(prediction.picture, values)
        file = gr.FileData(path=save_pil_to_cache(overlay, get_upload_folder(), format="png"))
        return file.model_dump(), values.round(6).tolist(), prediction.probs

    for function in (classify, explain):
        demo.blocks[gr.api(function, **TOGETHER)["inputs"][0]].value = FILE


def open_page() -> tuple[gr.Blocks, dict]:
    """Return the page and its launch options; without a model, exit, or show why on the Hub."""
    try:
        classifier = Classifier(*choose_model())
        return build(classifier), {"allowed_paths": [str(p.parent) for p in classifier.examples]}
    except UserError as error:
        if "SPACE_ID" not in os.environ:
            raise SystemExit(f"Error: {error.message}") from None
        with gr.Blocks(title="Image classifier", analytics_enabled=False) as demo:
            text = f"{error.message} This page tries again every 30 seconds."
            gr.HTML(wording.STATUS.format(escape(text)))
        return demo, {"prevent_thread_lock": True, "head": RELOAD}


demo, options = open_page()

if __name__ == "__main__":
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["system-ui", "sans-serif"]}
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", **fonts)
    while demo.launch(
        theme=theme.set(body_text_color_subdued="*neutral_600"), max_file_size=MAX_BYTES,
        css_paths=Path(__file__).with_name("style.css"), state_session_capacity=200,
        share=os.environ.get("SHARE") == "1", ssr_mode=False, footer_links=["api"],
        mcp_server=find_spec("mcp") is not None, **options,
    ) and "head" in options:  # fmt: skip
        time.sleep(30)
        demo.close()
        demo, options = open_page()
