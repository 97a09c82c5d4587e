"""The page and the endpoints of the Space: classify a picture and show the model's attention."""

import os
import sys
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Literal

import gradio as gr
from gradio.processing_utils import get_upload_folder, is_in_or_equal, save_pil_to_cache
from gradio_client.utils import is_file_obj_with_meta, traverse

import inference
import wording
from inference import EXAMPLES, Classifier, UserError, attention

COLORS = [f"rgb{tuple(c[:3].tolist())}" for c in attention.COLORMAP(range(0, 256, 51), bytes=True)]
SCALE = f'least <i style="background: linear-gradient(90deg, {", ".join(COLORS)})"></i> most'
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1}


class Page(gr.Blocks):
    """Blocks that accept files only as uploads; Gradio itself would download an address."""

    def validate_inputs(self, block_fn, inputs):
        try:
            super().validate_inputs(block_fn, inputs)
            traverse(inputs, upload_path, is_file_obj_with_meta)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except ValueError:
            message = "The inputs are not those that the API page describes."
            raise gr.Error(message, print_exception=False) from None


def upload_path(file: dict | None) -> str:
    """Return the path of an uploaded file; UserError for anything else."""
    if file is None:
        raise UserError("Upload a picture or choose an example.")
    path = file.get("path") if isinstance(file, dict) else None
    if not isinstance(path, str) or not is_in_or_equal(path, get_upload_folder()):
        raise UserError("Upload the picture as a file: an address or a path is not read.")
    return path


def build(classifier: Classifier | None, problem: str = "") -> gr.Blocks:
    """Build the page of a classifier; without one, it shows the problem."""
    title = wording.page_title(classifier)
    with Page(title=title, delete_cache=(3600, 3600), analytics_enabled=False) as demo:
        gr.Markdown(f"# {title}")
        if classifier:
            add_components(demo, classifier)
            add_endpoints(classifier)
        else:
            gr.HTML(wording.status(problem), elem_id="verdict")
    return demo.queue(max_size=256)


def add_components(demo: gr.Blocks, classifier: Classifier) -> None:
    """Lay out the page and connect its events."""
    known = [path for path in EXAMPLES if path.stem in classifier.labels]
    examples = EXAMPLES if len(known) > len(EXAMPLES) / 2 else known  # the others are then OOD
    config = classifier.model.config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    gallery = {"allow_preview": False, "interactive": False, "buttons": []}
    gr.Markdown(f"{wording.HELP}\n\n{wording.link(classifier)}")
    with gr.Row():
        with gr.Column(min_width=320):
            picture = gr.Image(
                examples[0] if examples else None, type="filepath", label="Picture", height=300,
                buttons=["fullscreen"], alt_text="The picture to classify", elem_id="picture",
            )  # fmt: skip
            samples = gr.Gallery(
                [(path, path.stem) for path in examples], label="Examples", columns=5,
                visible=bool(examples), elem_id="examples", **gallery,
            )  # fmt: skip
            verdict = gr.HTML(elem_id="verdict")
            bars = gr.Label(num_top_classes=5, label="Confidence", show_heading=False)
        with gr.Column(min_width=320):
            overlay = gr.Image(label="Attention", buttons=["fullscreen"], elem_id="map")
            caption = gr.HTML(elem_id="caption")
            method = gr.Radio(wording.METHODS, value="mean", label="Map")
            layer = gr.Slider(0, layers - 1, layers - 1, step=1, label="Layer", buttons=[])
            head = gr.Slider(0, heads - 1, 0, step=1, label="Head", visible=False, buttons=[])
            classes = [("Predicted class", ""), *classifier.labels]
            label = gr.Dropdown(classes, value="", label="Class", visible=False)
            opacity = gr.Slider(0, 1, 0.8, step=0.05, label="Opacity of the map", buttons=[])
    tiles = gr.Gallery(label="All layers", columns=6, elem_id="layers", **gallery)
    gr.Markdown(wording.about(classifier))

    def show(file, method, layer, head, label, opacity):
        """Compute all that is shown from the picture and the controls, and from nothing else."""
        visible = [gr.update(visible=method in methods) for methods in wording.CONTROL_METHODS]
        try:
            prediction = classifier.predict_file(upload_path(file))
            values = classifier.select_map(prediction, method, layer, head, label)
        except UserError as error:
            return wording.status(str(error)), None, None, "", [], *visible
        means = [classifier.select_map(prediction, "mean", number) for number in range(layers)]
        text = wording.caption(prediction, method, layer, head, label)
        image = attention.overlay(prediction.picture, values, inference.MAX_SHOWN, opacity or 0)
        small = [attention.overlay(prediction.picture, mean, 160, opacity or 0) for mean in means]
        return (
            wording.status(wording.answer(classifier, prediction)),
            {name: min(p, 0.994) for name, p in prediction.probs.items()},  # at most 99 %
            gr.Image(image, alt_text=text),
            f'{escape(text)}<div class="scale">{SCALE}</div>',
            [(tile, f"Layer {number}") for number, tile in enumerate(small)],
            *visible,
        )

    def choose_example(event: gr.SelectData):
        return examples[event.index]

    def choose_layer(event: gr.SelectData):
        return event.index

    # A single event, so that the latest of several quick actions decides all that is shown.
    controls = [method, layer, head, label, opacity]
    latest = {"trigger_mode": "always_last", "api_visibility": "private"}
    gr.on(
        [demo.load, picture.change, *(control.change for control in controls)],
        show, [picture, *controls], [verdict, bars, overlay, caption, tiles, layer, head, label],
        preprocess=False, show_progress="minimal", **latest, **ONE_AT_A_TIME,
    )  # fmt: skip
    samples.select(choose_example, None, picture, queue=False, **latest)
    # One control after the other: two changes at once would start that event twice.
    chosen = tiles.select(choose_layer, None, layer, queue=False, **latest)
    chosen.then(lambda m: m if m == "head" else "mean", method, method, queue=False, **latest)


def add_endpoints(classifier: Classifier) -> None:
    """Add /classify and /explain for programs."""

    def run(image: dict, *choice):
        try:
            prediction = classifier.predict_file(upload_path(image))
            return prediction, classifier.select_map(prediction, *choice)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def classify(image: gr.FileData) -> tuple[dict[str, float], str]:
        """Return the probability of each class, and a warning for a picture of none of them."""
        prediction, _ = run(image, "mean")
        return prediction.probs, "" if classifier.is_in_distribution(prediction) else wording.OOD

    def explain(
        image: gr.FileData, method: Literal[attention.METHODS] = "mean", layer: int = -1,
        head: int = 0, label: str = "",
    ) -> tuple[gr.FileData, list[list[float]], dict[str, float]]:  # fmt: skip
        """Return the map over the picture, the map in rows of patches, and the probabilities.

        Args:
            method: The mean of a layer's heads, one head, attention rollout or class relevance.
            layer: Counted from 0, or back from -1, the last layer.
            head: Counted from 0.
            label: The class that relevance is for; by default the predicted class.
        """
        prediction, values = run(image, method, layer, head, label)
        overlay = attention.overlay(prediction.picture, values)
        file = gr.FileData(path=save_pil_to_cache(overlay, get_upload_folder(), format="png"))
        return file.model_dump(), values.round(6).tolist(), prediction.probs

    for function in (classify, explain):
        gr.api(function, **ONE_AT_A_TIME)


def open_classifier() -> tuple[Classifier | None, str]:
    """Return the model of MODEL_ID, else the one trained last; on the Hub, None and the problem."""
    inference.limit_threads()
    name, revision = os.environ.get("MODEL_ID", "").strip(), os.environ.get("MODEL_REVISION")
    with suppress(ModuleNotFoundError):  # the published Space has no `pipeline`
        from pipeline import errors, runs

        with suppress(errors.UserError):
            name = name or runs.last_run()
    try:
        if not name:
            raise UserError("There is no model: train one, or name one in the variable MODEL_ID.")
        return Classifier(name, revision or None), ""
    except UserError as error:
        if "SPACE_ID" in os.environ:
            return None, str(error)
        sys.exit(f"Error: {error}")


demo = build(*open_classifier())

if __name__ == "__main__":
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["system-ui", "sans-serif"]}
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", **fonts)
    demo.launch(
        share=os.environ.get("SHARE") == "1", max_file_size=inference.MAX_BYTES,
        theme=theme.set(body_text_color_subdued="*neutral_600"), state_session_capacity=200,
        css_paths=Path(__file__).with_name("style.css"), allowed_paths=[EXAMPLES[0].parent],
        ssr_mode=False, footer_links=["api"],
    )  # fmt: skip
