"""Figures of units: what is drawn where, read back from matplotlib's figures."""

import colorsys

import numpy as np
import pytest
from matplotlib.figure import Figure

from hubert_lightning.figure_style import png_of
from hubert_lightning.frames import frame_centres
from hubert_lightning.units.figures import (
    LayerCurve,
    UtteranceUnits,
    accuracies,
    layer_figure,
    palette,
    phone_cluster_figure,
    utterance_figure,
)

PHONES = ["AH", "S", "sil"]
COUNTS = np.array([[9, 0, 1, 0, 3], [1, 8, 0, 0, 0], [0, 1, 20, 0, 1]])  # (phones, clusters); cluster 3 is dead


def units(**more: object) -> UtteranceUnits:
    known = {
        "title": "ann-1",
        "subtitle": "costs $5 and $6",
        "duration": 0.105,
        "spectrogram": np.zeros((80, 11)),
        "phones": [("S", 0.0, 0.05), ("AH", 0.05, 0.1)],
        "labels": [[1, 1, 0, 0, 4]],
        "predictions": [[1, 0, 0, 2, 4]],
        "mask": [(1, 3)],
    }
    return UtteranceUnits(**known | more)  # type: ignore[arg-type]


def strips(figure: Figure) -> dict[str, np.ndarray]:
    """Colours of each strip by its name: (frames, 3)."""
    named = {}
    for axes in figure.axes:
        names = [label.get_text() for label in axes.get_yticklabels()]
        if len(names) == 1 and axes.images:
            named[names[0]] = np.asarray(axes.images[0].get_array())[0]
    return named


def hue(colour: np.ndarray) -> float:
    return colorsys.rgb_to_hsv(*colour)[0]


def test_a_cluster_has_the_hue_of_its_most_likely_phone_and_silence_is_grey() -> None:
    colours = palette(5, PHONES, COUNTS)
    assert hue(colours.clusters[0]) == pytest.approx(hue(colours.clusters[4]))
    assert hue(colours.clusters[0]) == pytest.approx(hue(np.array(colours.phones["AH"])))
    assert hue(colours.clusters[1]) != pytest.approx(hue(colours.clusters[0]), abs=0.1)
    assert not np.array_equal(colours.clusters[0], colours.clusters[4])
    assert len({*colours.clusters[2]}) == len({*colours.phones["sil"]}) == 1


def test_without_phones_clusters_still_differ() -> None:
    assert len(np.unique(palette(500).clusters, axis=0)) == 500


def test_a_strip_has_a_cell_at_the_centre_of_each_frame() -> None:
    figure = utterance_figure(units(), [palette(5, PHONES, COUNTS)])
    images = [axes.images[0] for axes in figure.axes if [*map(str, axes.get_yticklabels())] and axes.images]
    left, right, *_ = images[1].get_extent()  # after the spectrogram
    centres = np.linspace(left, right, 11)[1::2]  # of five cells
    np.testing.assert_allclose(centres, frame_centres(5).numpy())


def test_strips_show_labels_predictions_masks_and_what_is_correct() -> None:
    colours = palette(5, PHONES, COUNTS)
    drawn = strips(utterance_figure(units(), [colours]))
    assert [*drawn] == ["masked", "label", "prediction", "correct"]
    np.testing.assert_array_equal(drawn["label"], colours.clusters[[1, 1, 0, 0, 4]])
    np.testing.assert_array_equal(drawn["prediction"], colours.clusters[[1, 0, 0, 2, 4]])
    assert [tuple(cell) == tuple(drawn["masked"][1]) for cell in drawn["masked"]] == [False, True, True, True, False]
    assert [tuple(cell) == tuple(drawn["correct"][0]) for cell in drawn["correct"]] == [True, False, True, False, True]


def test_accuracy_is_that_of_masked_and_of_other_frames() -> None:
    assert accuracies(units()) == (pytest.approx(1 / 3), 1.0)
    title = utterance_figure(units(), [palette(5)]).axes[0].get_title(loc="left")
    assert title == "ann-1: 33 % of masked frames correct, 100 % of the others\ncosts $5 and $6"


def test_each_of_three_streams_has_strips_and_a_picture_needs_no_spectrogram_or_phones() -> None:
    four = {"labels": [[0, 1]] * 4, "predictions": [[0, 1]] * 4, "mask": [], "duration": 0.045}
    figure = utterance_figure(units(**four, spectrogram=None, phones=None, subtitle="語"), [palette(2)] * 4)
    names = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    kinds = ("label", "prediction")
    assert {*names} == {"masked", "correct", *(f"{kind} {number}" for number in (1, 2, 3) for kind in kinds)}
    assert "語" not in figure.axes[0].get_title(loc="left")  # matplotlib's font lacks it
    assert png_of(figure).startswith(b"\x89PNG")


def test_the_heat_map_orders_phones_by_frequency_and_clusters_by_phone() -> None:
    axes = phone_cluster_figure(PHONES, COUNTS, "labels").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sil", "AH", "S"]
    expected = COUNTS[[2, 0, 1]][:, [2, 0, 4, 1]]  # of AH, cluster 0 is purer than 4
    np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), expected / expected.sum(axis=0))
    assert "1 of 5 without a frame left out" in axes.get_xlabel()
    assert axes.get_title(loc="left").startswith("labels: PNMI 0.")


def test_layer_curves_have_a_line_for_each_iteration() -> None:
    curves = [LayerCurve("iteration 1", [0.3, 0.4], [[0.1, 0.2]], labels=0.25), LayerCurve("iteration 2", [0.5, 0.45])]
    axes = layer_figure(curves, "PNMI", 100).axes[0]
    named = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in axes.lines}
    assert named["iteration 1"] == [0.3, 0.4]
    assert named["iteration 2"] == [0.5, 0.45]
    assert named["labels of iteration 1"] == [0.25, 0.25]
    assert axes.get_ylabel() == "PNMI of 100 clusters"
    assert {text.get_text() for text in axes.texts} == {"0.400", "0.500"}
