"""The Space's predictions: right maps, safe decoding, and models that cannot be loaded."""

import copy
import io
import itertools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    pipeline,
)

import inference
import loading
from bad_pictures import write_bad_pictures
from inference import Classifier, UserError
from pipeline.evaluation.ood import DEPTH, SCORES, Detector
from pipeline.evaluation.outputs import pool_layer
from pipeline.explain import attention
from samples import draw_image

RESULTS, FAITHFULNESS = loading.RESULTS
CAT = next(path for path in inference.EXAMPLES if path.stem == "cat")


@pytest.fixture
def classifier(model_folder, monkeypatch) -> Classifier:
    """The untrained classifier of digits, in float32."""
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")  # nothing is measured
    return Classifier(str(model_folder))


@pytest.fixture
def copied(model_folder, tmp_path) -> Path:
    """A copy of its folder, to change."""
    return shutil.copytree(model_folder, tmp_path / "copied")


# --- Predictions ------------------------------------------------------------------------------


def test_one_forward_pass_gives_the_prediction_and_all_maps_but_relevance(classifier):
    calls = []
    classifier.model.register_forward_hook(lambda *_: calls.append(1))
    image = draw_image(0, (40, 30))
    prediction = classifier.predict(image)
    pixels = classifier.processor(image, return_tensors="pt")["pixel_values"]
    expected = attention.compute_maps(classifier.model, pixels, 3)
    calls.clear()
    for layer in range(2):
        for head in range(2):
            values = classifier.select_map(prediction, "head", layer, head)
            np.testing.assert_allclose(values, expected.heads[0, layer, head], atol=1e-6)
        values = classifier.select_map(prediction, "mean", layer)
        np.testing.assert_allclose(values, expected.heads[0, layer].mean(dim=0), atol=1e-6)
    values = classifier.select_map(prediction, "rollout")
    np.testing.assert_allclose(values, expected.rollout[0], atol=1e-6)
    assert calls == []
    for _ in range(2):
        values = classifier.select_map(prediction, "relevance", label="3")
        np.testing.assert_allclose(values, expected.relevance[0], atol=1e-6)
    assert calls == [1]  # computed when it is requested, and kept


def test_probabilities_are_those_of_the_transformers_pipeline(classifier, model_folder):
    image = draw_image(1, (50, 70))
    classify = pipeline("image-classification", model=str(model_folder))
    expected = {entry["label"]: entry["score"] for entry in classify(image, top_k=10)}
    probs = classifier.predict(image).probs
    assert probs == pytest.approx(expected, abs=1e-5)
    assert list(probs.values()) == sorted(probs.values(), reverse=True)


def test_equal_files_are_predicted_once_and_the_cache_is_bounded(classifier, tmp_path, monkeypatch):
    shutil.copyfile(CAT, tmp_path / "other_name.png")
    prediction = classifier.predict_file(CAT)
    assert classifier.predict_file(tmp_path / "other_name.png") is prediction
    draw_image(0).save(tmp_path / "other_name.png")  # the same path with other content
    assert classifier.predict_file(tmp_path / "other_name.png") is not prediction
    monkeypatch.setattr(inference, "MAX_CACHED", 2)
    for path in inference.EXAMPLES:
        classifier.predict_file(path)
    assert len(classifier.cache) <= 3


def test_a_picture_is_out_of_distribution_only_where_that_was_measured_to_separate(classifier):
    prediction = classifier.predict(draw_image(0))
    ood, energy = classifier.results["ood"], prediction.maps.logits.logsumexp(dim=1).item()
    ood["threshold"] = energy + 0.1
    assert classifier.is_ood(prediction)
    ood["threshold"] = energy - 0.1
    assert not classifier.is_ood(prediction)
    ood["threshold"] = energy + 0.1
    for auroc in ({"digits": 0.99, "photographs": 0.55}, {"digits": None}, {}, None, 0.9):
        ood["auroc"] = auroc
        assert not classifier.is_ood(prediction)
    for results in ({"ood": None}, {}, None):
        classifier.results = results
        assert not classifier.is_ood(prediction)


@pytest.mark.parametrize("score", SCORES)
def test_each_score_is_the_one_that_the_evaluation_chose_from(classifier, score):
    prediction = classifier.predict(draw_image(0))
    output = classifier.exact(prediction.pixels)
    gaussian = torch.randn(32, dtype=torch.float64), torch.eye(32, dtype=torch.float64) * 3
    scored = Detector(score, 0.0, *gaussian).score(output.logits, pool_layer(output, DEPTH))
    expected = scored.item()
    ood = {"score": score, "auroc": {"digits": 0.9}, "gaussian": [x.tolist() for x in gaussian]}
    classifier.results["ood"] = ood
    for threshold, is_ood in ((expected - 1e-3, False), (expected + 1e-3, True)):
        ood["threshold"] = threshold
        assert classifier.is_ood(prediction) == is_ood


def test_the_most_faithful_method_is_the_default(classifier):
    assert classifier.best_method() == "mean"  # not measured
    areas = {m: {"insertion": {"auc": 0.5}, "deletion": {"auc": 0.4}} for m in attention.METHODS}
    areas["rollout"]["deletion"]["auc"] = 0.2
    areas["random"] = {"insertion": {"auc": 0.9}, "deletion": {"auc": 0.1}}
    classifier.faithfulness = {"methods": areas}
    assert classifier.best_method() == "rollout"


def test_a_model_that_crops_is_shown_what_it_sees(copied, monkeypatch):
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    square = {"height": 32, "width": 32}
    change_json(
        copied / "preprocessor_config.json",
        size={"shortest_edge": 40}, do_center_crop=True, crop_size=square,
    )  # fmt: skip
    image = Image.new("RGB", (200, 100), "white")
    image.paste("black", (60, 10, 140, 90))  # 32 of 40 parts of the shorter side
    prediction = Classifier(str(copied)).predict(image)
    assert prediction.picture.size == (100, 100)
    assert np.asarray(prediction.picture)[2:-2, 2:-2].max() == 0
    expected = pipeline("image-classification", model=str(copied))(image, top_k=10)
    expected = {entry["label"]: entry["score"] for entry in expected}
    assert prediction.probs == pytest.approx(expected, abs=1e-5)
    # As DeiT's own processor: squashed to a square first.
    change_json(copied / "preprocessor_config.json", size={"height": 40, "width": 40})
    prediction = Classifier(str(copied)).predict(image)
    assert prediction.picture.size == (160, 80)
    expected = pipeline("image-classification", model=str(copied))(image, top_k=10)
    expected = {entry["label"]: entry["score"] for entry in expected}
    assert prediction.probs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (("mean", 2, 0, ""), "no layer 2; choose from 0 to 1"),
        (("head", 0, 9, ""), "no head 9; choose from 0 to 1"),
        (("relevance", 0, 0, "zebra"), 'no class "zebra"; choose from 0, 1, 2'),
        (("gradient", 0, 0, ""), 'no map "gradient"'),
        (("mean", "last", 0, ""), "must be whole numbers"),
        (("mean", 1.0, None, ""), "must be whole numbers"),
        ((["mean"], 0, 0, ""), "no map"),
    ],
)
def test_an_unknown_map_is_a_user_error(classifier, choice, message):
    prediction = classifier.predict(draw_image(0))
    with pytest.raises(UserError, match=message):
        classifier.select_map(prediction, *choice)


# --- Runtime ----------------------------------------------------------------------------------


@pytest.fixture
def batches() -> tuple[torch.Tensor, ...]:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(1)


def set_times(monkeypatch, *seconds: float) -> None:
    """Let each copy of the model take so long on a picture: float32, then the others."""
    ends = itertools.accumulate(t for s in itertools.cycle(seconds) for t in (0, s))
    monkeypatch.setattr("timeit.default_timer", lambda: next(ends))


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_a_faster_precision_that_agrees_is_chosen(model_folder, batches, monkeypatch, precision):
    model, _ = loading.load("digits", model_folder)
    if precision == "bfloat16":
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"bf16": True})
    order = {"float32": 2.0, "bfloat16": 2.0, "int8": 2.0} if precision == "bfloat16" else {
        "float32": 2.0, "int8": 2.0
    }  # fmt: skip
    set_times(monkeypatch, *(order | {precision: 1.0}).values())
    chosen, name = loading.choose_precision(model, batches)
    assert name == precision
    assert chosen is not model
    assert chosen.classifier.weight.dtype == torch.float32
    for pixels in batches:
        exact = attention.compute_maps(model, pixels, relevance=False)
        maps = attention.compute_maps(chosen, pixels.to(chosen.dtype), relevance=False)
        change = exact.logits.softmax(dim=1) - maps.logits.float().softmax(dim=1)
        assert change.abs().max() <= loading.TOLERANCE
        assert (exact.heads - maps.heads.float()).abs().mean() < 0.01


def test_all_heads_stay_in_float32(batches, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"bf16": True})
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DeiTConfig(**sizes, intermediate_size=64, image_size=32, patch_size=8, num_labels=3)
    model = DeiTForImageClassificationWithTeacher(config).eval()
    for times in ((2.0, 1.0, 3.0), (2.0, 3.0, 1.0)):
        set_times(monkeypatch, *times)
        monkeypatch.setattr(loading, "TOLERANCE", 1.0)
        chosen, _ = loading.choose_precision(model, batches[:1])
        for name in ("cls_classifier", "distillation_classifier"):
            assert chosen.get_submodule(name).weight.dtype == torch.float32


def test_a_precision_that_is_slower_or_disagrees_is_not_chosen(model_folder, batches, monkeypatch):
    model, _ = loading.load("digits", model_folder)
    set_times(monkeypatch, 1.0, 2.0)
    assert loading.choose_precision(model, batches) == (model, "float32")
    set_times(monkeypatch, 2.0, 1.0)
    monkeypatch.setattr(loading, "TOLERANCE", 0)
    assert loading.choose_precision(model, batches) == (model, "float32")


def test_relevance_is_computed_in_float32_whatever_the_model_runs_in(model_folder, monkeypatch):
    monkeypatch.setattr(
        loading, "choose_precision", lambda model, _: (copy.deepcopy(model).bfloat16(), "bfloat16")
    )
    classifier = Classifier(str(model_folder))
    prediction = classifier.predict(draw_image(0))
    expected = attention.compute_maps(classifier.exact, prediction.pixels, 3).relevance[0]
    values = classifier.select_map(prediction, "relevance", label="3")
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_threads_are_limited_to_the_cores_of_the_container(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("CPU_CORES", "1")
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    loading.choose_precision(None, ())
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


# --- Pictures ---------------------------------------------------------------------------------


def test_a_bad_picture_is_a_user_error(classifier, tmp_path):
    for path, message in write_bad_pictures(tmp_path).items():
        with pytest.raises(UserError, match=message):
            classifier.predict_file(path)
    with pytest.raises(UserError, match="no longer on the server"):
        classifier.predict_file(tmp_path / "deleted.png")


def open_saved(image: Image.Image, file_format: str = "PNG", **options) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    opened = inference.open_picture(file.getvalue())
    assert opened.mode == "RGB"
    return np.asarray(opened)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "LA", "P", "1"])
def test_other_modes_are_converted_as_pillow_does(mode):
    image = draw_image(0, (20, 16))
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image = image.convert(mode)
    opened = open_saved(image, "TIFF" if mode == "CMYK" else "PNG")
    assert np.array_equal(opened, image.convert("RGB"))


def test_16_bit_gray_is_scaled_to_8_bits():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    assert np.array_equal(open_saved(Image.fromarray(ramp))[..., 0], ramp >> 8)


def test_exif_orientation_is_applied_and_an_animations_first_frame_is_used():
    image, other = draw_image(0, (20, 16)), draw_image(1, (20, 16))
    exif = Image.Exif()
    exif[274] = 6  # rotate by 90 degrees
    rotated = image.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(open_saved(image, exif=exif), rotated)
    assert np.array_equal(open_saved(image, save_all=True, append_images=[other]), image)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_a_large_picture_is_shrunk_and_does_not_hold_up_a_small_one(file_format):
    small, large = io.BytesIO(), io.BytesIO()
    draw_image(0, (20, 16)).save(small, file_format)
    image = draw_image(1, (6, 4)).resize((4200, 2800), Image.Resampling.BICUBIC)
    image.save(large, file_format)
    with ThreadPoolExecutor() as pool:
        with inference.ONE_LARGE:  # another one is being decoded
            waiting = pool.submit(inference.open_picture, large.getvalue())
            assert inference.open_picture(small.getvalue()).size == (20, 16)
            assert not waiting.done()
        shrunk = waiting.result()
    assert max(shrunk.size) == inference.MAX_DECODED
    difference = np.asarray(shrunk, dtype=float) - np.asarray(image.resize(shrunk.size), float)
    assert np.abs(difference).mean() < 1


# --- Models -----------------------------------------------------------------------------------


def test_results_count_only_for_the_files_they_were_measured_on(copied, monkeypatch):
    monkeypatch.chdir(copied.parent)
    results = json.loads((copied / RESULTS).read_text())
    assert loading.read_results(copied)[0] == results
    Path("results/copied").mkdir(parents=True)
    (copied / RESULTS).rename(Path("results/copied") / RESULTS)
    assert loading.read_results(copied)[0] == results  # of a run in this checkout
    (copied / "config.json").write_text((copied / "config.json").read_text() + "\n")
    assert loading.read_results(copied)[0] is None


@pytest.mark.parametrize("content", ["", "[1]", '{"model": null}', "\x00"])
def test_broken_results_count_as_none(copied, content):
    (copied / RESULTS).write_text(content)
    (copied / FAITHFULNESS).write_text(content)
    assert loading.read_results(copied) == [None, None]


@pytest.mark.parametrize("key", ["accuracy", "accuracy_interval", "dataset"])
def test_results_without_what_the_page_shows_count_as_none(copied, key):
    change_json(copied / RESULTS, **{key: []})
    assert loading.read_results(copied)[0] is None


def change_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def break_model(folder: Path, kind: str) -> None:
    names = {str(number): str(number) for number in range(10)}
    if kind == "no processor":
        (folder / "preprocessor_config.json").unlink()
    elif kind == "shortest edge":
        change_json(folder / "preprocessor_config.json", size={"shortest_edge": 32})
    elif kind == "cut weights":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[:5000])
    elif kind == "duplicate labels":
        change_json(folder / "config.json", id2label=names | {"3": "4"})
    elif kind == "gap in labels":
        change_json(folder / "config.json", id2label={**names, "10": "10"})
    elif kind == "unknown type":
        change_json(folder / "config.json", model_type="nothing")
    elif kind == "backbone":
        model = AutoModelForImageClassification.from_pretrained(folder)
        ViTModel(model.config, add_pooling_layer=False).save_pretrained(folder)
    elif kind == "other head":
        change_json(folder / "config.json", id2label=names | {"10": "ten"})
    elif kind == "code of its own":
        change_json(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Mine"})
        (folder / "mine.py").write_text("raise SystemExit('it was run')")
    elif kind == "ConvNeXt":
        config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
        ConvNextForImageClassification(config).save_pretrained(folder)
    elif kind == "ResNet":
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        ResNetForImageClassification(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no processor", r"incomplete: it has no preprocessor_config\.json"),
        ("shortest edge", r"cannot be loaded: Input image size \(32\*48\) does"),
        ("cut weights", "cannot be loaded"),
        ("duplicate labels", "not a fine-tuned classifier with named classes"),
        ("gap in labels", "cannot be loaded"),
        ("unknown type", "cannot be loaded"),
        ("backbone", "not a fine-tuned classifier"),
        ("other head", "cannot be loaded: You set `ignore_mismatched_sizes` to `False`"),
        ("code of its own", "cannot be loaded"),
        ("ConvNeXt", "ConvNextForImageClassification has no global attention"),
        ("ResNet", "ResNetForImageClassification has no global attention"),
    ],
)
def test_a_broken_model_is_a_user_error(copied, kind, message):
    break_model(copied, kind)
    with pytest.raises(UserError, match=message) as error:
        Classifier(str(copied))
    assert "\n" not in str(error.value)


def test_a_model_of_1000_classes_is_shown(copied, monkeypatch):
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    names = {number: f"class {number}" for number in range(1000)}
    config = ViTConfig.from_pretrained(copied, id2label=names)
    ViTForImageClassification(config).save_pretrained(copied)
    assert len(Classifier(str(copied)).predict(draw_image(0)).probs) == 1000


@pytest.fixture
def published(hub_server, model_folder, tmp_path, monkeypatch) -> str:
    """The commit of the model `me/digits` on the local Hub, of which nothing is cached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    local_hub = pytest.importorskip("local_hub")
    repository = local_hub.Repository(hub_server.root, "models", "me/digits")
    repository.create()
    repository.add_folder(model_folder)
    return repository.resolve("main")


def test_a_model_is_downloaded_at_its_commit(published):
    folder, commit = loading.download("me/digits", published)
    assert commit == published
    assert {file.name for file in folder.iterdir()} == {*loading.FILES, RESULTS}
    assert loading.download("me/digits")[1] == published


def test_without_the_hub_the_cached_copy_is_used(published, monkeypatch):
    loading.download("me/digits")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    assert loading.download("me/digits", published)[1] == published
    assert loading.download("me/digits")[1] == published
    with pytest.raises(UserError, match='no cached model "me/other" .* and the Hub .* not respond'):
        loading.download("me/other", published)


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("me/nothing", None, 'no public model "me/nothing" on the Hub at'),
        ("me/digits", "gone", '"me/digits" with the revision "gone"'),
        ("me/digits", "0" * 40, '"me/digits" with the revision "0000'),
        ("no name/at/all", None, 'no public model "no name/at/all"'),
    ],
)
def test_a_missing_model_is_a_user_error(published, name, revision, message):
    with pytest.raises(UserError, match=message):
        loading.download(name, revision)
