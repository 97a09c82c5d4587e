"""The page and the endpoints of the Space: a picture in; the answer, and where the model looked."""

import base64
import io
import os
from html import escape
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio reads it

import gradio as gr
import numpy as np
from gradio.processing_utils import get_upload_folder, is_in_or_equal
from huggingface_hub import constants
from PIL import Image

import inference
from inference import Answer, Classifier, Refusal, attention

HERE = Path(__file__).parent
METHODS = [
    ("Mean of a layer", "mean"),
    ("One head", "head"),
    ("Rollout", "rollout"),
    ("Relevance", "relevance"),
]
LIKELIEST = "the likeliest"
TAKEN = (
    f"JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF, up to {inference.MAX_BYTES // 2**20} MB and "
    f"{inference.MAX_PIXELS // 10**6} million pixels. Deleted within two hours."
)
DOUBT = (
    "This does not look like anything the model was trained on: the bars tell which of its "
    "classes comes closest, not what it is."
)
NO_PICTURE = "There is no picture: upload one, or choose an example."
# A click, by mouse or keyboard, on one of several buttons in a piece of HTML.
PICK = """element.addEventListener("click", event => {
    const button = event.target.closest("button[data-index]");
    if (button) trigger("select", {index: Number(button.dataset.index), value: button.title});
});"""


def picture_input(*arguments, **options) -> gr.Image:
    """A picture handed on as it was uploaded: `inference` opens it, within its limits.

    Gradio's own opening would come first. No subclass, for gradio writes files beside one.
    """
    component = gr.Image(*arguments, type="filepath", **options)
    component.preprocess = lambda payload: payload.path if payload else None
    return component


class Page(gr.Blocks):
    """Blocks that take a picture as an upload only, and say so in a sentence.

    By themselves they would fetch an address, and answer a path without words.
    """

    async def preprocess_data(self, block_fn, inputs, *rest, **options):
        for component, value in zip(block_fn.inputs, inputs, strict=False):
            if isinstance(component, gr.Image) and value is not None:
                path = value.get("path") if isinstance(value, dict) else None
                if not isinstance(path, str) or not is_in_or_equal(path, get_upload_folder()):
                    raise refused("Upload the picture: a path or an address is not read.")
        try:
            return await super().preprocess_data(block_fn, inputs, *rest, **options)
        except gr.Error as error:
            error.print_exception = False
            raise
        except ValueError:
            raise refused("What was sent is not of the types that the API page names.") from None


def refused(sentence: str) -> gr.Error:
    return gr.Error(sentence, print_exception=False)


def build(classifier: Classifier | None, trouble: str | None = None) -> gr.Blocks:
    """The page of a classifier; where there is none, it says what the trouble is."""
    with Page(title="Where a Vision Transformer looks", delete_cache=(3600, 3600)) as page:
        gr.HTML(
            "<h1>What is in the picture, and where the model looked</h1>"
            "<p>A Vision Transformer names what it sees, and shows which parts of the picture "
            "it drew on.</p>",
            elem_id="intro",
        )
        if classifier is None:
            gr.HTML(problem(trouble or "There is no model."))
        else:
            _lay_out(classifier)
            gr.HTML(about(classifier), elem_id="about")
        _serve(classifier, trouble)
    return page.queue(max_size=256, default_concurrency_limit=1)


def _lay_out(classifier: Classifier) -> None:
    """The components, and what happens when one is used."""
    last = classifier.layers - 1
    first = classifier.answer(inference.open_picture(inference.EXAMPLES[0]))
    state = gr.State(first, time_to_live=3600)
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            picture = picture_input(
                inference.EXAMPLES[0],
                label="Picture",
                sources=["upload", "clipboard", "webcam"],
                height=300,
                buttons=["fullscreen"],
                alt_text="The picture to classify",
                elem_id="picture",
            )
            gr.HTML(f"<p>{TAKEN}</p>", elem_id="taken")
            examples = gr.HTML(example_buttons(), js_on_load=PICK, elem_id="examples")
            said = gr.HTML(bars(classifier, first), elem_id="answer")
        with gr.Column(min_width=320):
            figure = gr.HTML(elem_id="figure")
            method = gr.Radio(METHODS, value="mean", label="Attention")
            layer = gr.Slider(0, last, last, step=1, label=f"Layer, from 0 to {last}", buttons=[])
            head = gr.Slider(
                0,
                classifier.heads - 1,
                0,
                step=1,
                label=f"Head, from 0 to {classifier.heads - 1}",
                visible=False,
                buttons=[],
            )
            label = gr.Dropdown(
                [LIKELIEST, *classifier.labels], label="What speaks for", visible=False
            )
    strip = gr.HTML(layer_buttons(classifier, first), js_on_load=PICK, elem_id="layers")
    controls = [method, layer, head, label]
    figure.value = draw(classifier, first, "mean", last, 0, LIKELIEST)

    def look(path: str | None, *chosen):
        """A new picture: all that is shown of it."""
        try:
            if path is None:
                raise Refusal(NO_PICTURE)
            answer = classifier.answer(inference.open_picture(path))
            return (
                answer,
                bars(classifier, answer),
                draw(classifier, answer, *chosen),
                layer_buttons(classifier, answer),
            )
        except Refusal as refusal:
            return None, problem(str(refusal)), "", ""

    def take_example(event: gr.SelectData, *chosen):
        path = inference.EXAMPLES[event.index]
        return path, *look(path, *chosen)

    def redraw(answer: Answer | None, *chosen):
        """Another map of the same picture, from what is computed already."""
        return draw(classifier, answer, *chosen) if answer else ""

    def choose_method(answer: Answer | None, method: str, *chosen):
        return (
            gr.update(visible=method in ("mean", "head")),
            gr.update(visible=method == "head"),
            gr.update(visible=method == "relevance"),
            redraw(answer, method, *chosen),
        )

    def take_layer(event: gr.SelectData, answer: Answer | None, method: str, _, *chosen):
        """A click on one of all layers: its head where one is chosen, else the mean."""
        method = method if method == "head" else "mean"
        shown = choose_method(answer, method, event.index, *chosen)
        return method, gr.update(value=event.index, visible=True), *shown[1:]

    # What needs the model waits in one line; what only draws does not wait.
    model = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
    plain = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    results = [state, said, figure, strip]
    gr.on(
        [picture.upload, picture.clear, picture.input],
        look,
        [picture, *controls],
        results,
        show_progress_on=said,
        trigger_mode="always_last",
        **model,
    )
    examples.select(take_example, controls, [picture, *results], show_progress_on=said, **model)
    method.input(
        choose_method, [state, *controls], [layer, head, label, figure],
        show_progress="hidden", **model,
    )  # fmt: skip
    label.input(redraw, [state, *controls], figure, show_progress_on=figure, **model)
    for slider in (layer, head):
        slider.input(redraw, [state, *controls], figure, trigger_mode="always_last", **plain)
    strip.select(take_layer, [state, *controls], [method, layer, head, label, figure], **plain)


def _serve(classifier: Classifier | None, trouble: str | None) -> None:
    """The endpoints for programs, /classify and /explain."""

    def ask(image: str | None) -> Answer:
        if classifier is None:
            raise Refusal(trouble)
        if image is None:
            raise Refusal("There is no picture: upload one.")
        return classifier.answer(inference.open_picture(image))

    def classify(image):
        """Which of the model's classes a picture shows.

        Returns the classes by confidence, and a sentence where the picture is unlike all the
        model was trained on (else an empty one).
        """
        try:
            answer = ask(image)
        except Refusal as refusal:
            raise refused(str(refusal)) from None
        return confidences(classifier, answer), "" if classifier.familiar(answer) else DOUBT

    def explain(image, method="mean", layer=-1, head=0, label=""):
        """Where the model looked.

        The method is mean (of a layer's heads), head, rollout or relevance; layer and head count
        from 0, or back from -1; label is the class whose relevance is asked for (empty: the
        likeliest). Returns the map laid over the picture, the map itself (rows of patches, one
        number each), and the classes by confidence.
        """
        try:
            if layer is None or head is None:
                raise Refusal("Layer and head are numbers.")
            answer = ask(image)
            values = classifier.map(answer, method, layer, head, label)
        except Refusal as refusal:
            raise refused(str(refusal)) from None
        picture = attention.overlay(answer.picture, values)
        return picture, values.round(6).tolist(), confidences(classifier, answer)

    with gr.Column(visible=False):
        image = picture_input(label="Picture, uploaded")
        method = gr.Radio(list(attention.METHODS), value="mean", label="Method")
        layer = gr.Number(-1, precision=0, label="Layer, from 0; -1 is the last")
        head = gr.Number(0, precision=0, label="Head, from 0")
        label = gr.Textbox("", label="Class of the relevance; empty: the likeliest")
        classes = gr.Label(label="Classes")
        doubt = gr.Textbox(label="Doubt")
        overlay = gr.Image(label="Overlay", format="png")
        values = gr.JSON(label="Map")
        model = {"concurrency_id": "model", "concurrency_limit": 1}
        gr.Button().click(classify, image, [classes, doubt], api_name="classify", **model)
        gr.Button().click(
            explain,
            [image, method, layer, head, label],
            [overlay, values, classes],
            api_name="explain",
            **model,
        )


def confidences(classifier: Classifier, answer: Answer) -> dict[str, float]:
    return dict(zip(classifier.labels, answer.probabilities.tolist(), strict=True))


def bars(classifier: Classifier, answer: Answer) -> str:
    """The classes by confidence, and the doubt where the picture is unlike those of training."""
    ranked = sorted(confidences(classifier, answer).items(), key=lambda item: -item[1])
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        f'<td class="bar" aria-hidden="true"><i style="width: {share:.2%}"></i></td>'
        f"<td>{percent(share)}</td></tr>"
        for label, share in ranked
    )
    (best, share), familiar = ranked[0], classifier.familiar(answer)
    verdict = f"<strong>{escape(best)}</strong>, {percent(share)} sure"
    return (
        '<section role="status" aria-label="Answer">'
        f'<p class="verdict">{verdict if familiar else "Nothing it knows"}</p>'
        + ("" if familiar else f'<p class="doubt">{DOUBT}</p>')
        + f'<table class="{"" if familiar else "doubted"}">'
        f'<caption class="unseen">Classes by confidence</caption>{rows}</table></section>'
    )


def draw(
    classifier: Classifier, answer: Answer, method: str, layer: int, head: int, label: str
) -> str:
    """The picture under one map, with what it shows in words."""
    label = None if label == LIKELIEST else label
    values = classifier.map(answer, method, layer, head, label)
    about = escape(label or classifier.labels[answer.probabilities.argmax()])
    caption = {
        "mean": f"Layer {layer}: where the [CLS] token attends, the mean of "
        f"{classifier.heads} heads.",
        "head": f"Layer {layer}, head {head}: where its [CLS] token attends.",
        "rollout": f"Attention through all {classifier.layers} layers, one multiplied by the "
        "next (Abnar &amp; Zuidema 2020).",
        "relevance": f"What speaks for “{about}”: attention weighted by that class's gradient "
        "(Chefer et al. 2021).",
    }[method]
    image = data_uri(attention.overlay(answer.picture, values, size=336))
    words = f"Attention over the picture, strongest {inference.where(values)}"
    return (
        f'<figure><img src="{image}" alt="{words}"><figcaption>{caption}'
        f'<span class="scale">less<i style="background: {scale()}"></i>more</span>'
        "</figcaption></figure>"
    )


def layer_buttons(classifier: Classifier, answer: Answer) -> str:
    """All layers side by side, each a button that shows it large."""
    small = answer.picture.copy()
    small.thumbnail((112, 112))
    tiles = []
    for layer in range(classifier.layers):
        values = classifier.map(answer, "mean", layer)
        image = data_uri(attention.overlay(small, values, size=96))
        words = f"Layer {layer}, strongest {inference.where(values)}"
        tiles.append(button(layer, words, image, str(layer)))
    return f"<h2>All layers, first to last</h2><ul>{''.join(tiles)}</ul>"


def example_buttons() -> str:
    tiles = [
        button(i, f"Example: {path.stem}", data_uri(Image.open(path), "PNG"))
        for i, path in enumerate(inference.EXAMPLES)
    ]
    return f"<h2>Or an example</h2><ul>{''.join(tiles)}</ul>"


def button(index: int, words: str, image: str, caption: str = "") -> str:
    caption = f'<span aria-hidden="true">{caption}</span>' if caption else ""
    return (
        f'<li><button type="button" data-index="{index}" title="{escape(words)}">'
        f'<img src="{image}" alt="{escape(words)}">{caption}</button></li>'
    )


def problem(sentence: str) -> str:
    return f'<p class="problem" role="alert">{escape(sentence)}</p>'


def about(classifier: Classifier) -> str:
    """What the model knows, how well it was measured to, and which one it is."""
    facts = {
        "It knows": f"{escape(', '.join(classifier.labels))}. Whatever a picture shows, the answer "
        "is one of these."
    }
    results = classifier.results
    if results:
        low, high = results["accuracy_interval"]
        dataset = results["dataset"]
        facts["It is right"] = (
            f"for {percent(results['accuracy'], 2)} of {dataset['images']:,} images of the "
            f"{escape(dataset['split'])} split of {escape(Path(dataset['name']).name)} "
            f"(95 % interval {percent(low, 2)} to {percent(high, 2)})."
        )
        if "familiarity" in results:
            facts["It doubts"] = familiarity(results["familiarity"], dataset["split"])
    else:
        facts["It is right"] = "how often was not published with this revision."
    revision = classifier.revision
    if revision:
        address = f"{constants.ENDPOINT}/{classifier.name}/tree/{revision}"
        which = (
            f'<a href="{escape(address)}">{escape(classifier.name)}</a> at revision '
            f"<code>{revision[:12]}</code>"
        )
    else:
        which = f"the one in the folder <code>{escape(classifier.name)}</code>"
    facts["The model"] = f"is {which}, computing in {classifier.precision}."
    return "<dl>" + "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in facts.items()) + "</dl>"


def familiarity(found: dict, split: str) -> str:
    others = " and ".join(f"{percent(share)} of {n}" for n, share in found["others"].items())
    return (
        "a picture unlike those of training. Without a doubt pass "
        f"{percent(found[split])} of the {escape(split)} images, and of pictures of other things "
        f"{escape(others)}."
    )


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def scale() -> str:
    """The maps' colours as a CSS gradient, from the least to the most."""
    stops = (attention.COLORS(np.linspace(0, 1, 6))[:, :3] * 255).astype(int)
    return f"linear-gradient(90deg, {', '.join(f'rgb({r} {g} {b})' for r, g, b in stops)})"


def data_uri(image: Image.Image, form: str = "JPEG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, form, quality=88)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def open_classifier() -> tuple[Classifier | None, str | None]:
    """The model of MODEL_ID and MODEL_REVISION, or why there is none.

    In a checkout, with neither set, it is the last run's.
    """
    inference.use_cores()
    name, revision = os.environ.get("MODEL_ID"), os.environ.get("MODEL_REVISION")
    try:
        return Classifier(name or _last_run(), revision or None), None
    except Refusal as refusal:
        return None, str(refusal)


def _last_run() -> str:
    try:
        from pipeline.errors import UserError
        from pipeline.evaluation import last_run
    except ModuleNotFoundError:
        raise Refusal("No model is named: set the variable MODEL_ID.") from None
    try:
        return last_run()
    except UserError as error:
        raise Refusal(str(error)) from None


if __name__ == "__main__":
    build(*open_classifier()).launch(
        share=os.environ.get("SHARE") == "1",
        theme=gr.themes.Default(
            primary_hue="teal", neutral_hue="slate", font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ).set(
            body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        ),
        css_paths=HERE / "style.css",
        allowed_paths=[HERE / "examples"],  # wherever it is started
        max_file_size=inference.MAX_BYTES,
        state_session_capacity=200,  # of half a megabyte each
        footer_links=["api", "settings"],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
    )  # fmt: skip
