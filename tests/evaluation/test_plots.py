from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from sklearn.metrics import average_precision_score

from hubert_ecg.evaluation import plots
from hubert_ecg.signal import LEADS

MM_PER_INCH = 25.4


def ecg(seconds=10.0, rate=100.0, leads=12):
    """A spike of 1 mV each second, on every lead."""
    signal = np.zeros((leads, round(seconds * rate)))
    signal[:, :: round(rate)] = 1.0
    return signal


def lines(axes, label):
    return [line for line in axes.get_lines() if line.get_label().strip() == label]


def leads_drawn(axes):
    return [line.get_label().strip() for line in axes.get_lines() if line.get_label().startswith(" ")]


def pixels(figure, dpi):
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


def test_classical_layout_of_twelve_leads():
    (axes,) = plots.ecg_paper(ecg(), 100).axes
    rows = ["I aVR V1 V4", "II aVL V2 V5", "III aVF V3 V6", "II"]
    assert leads_drawn(axes) == " ".join(rows).split()
    assert len(lines(axes, "calibration pulse")) == 4
    columns = [lines(axes, lead)[0].get_xdata()[[0, -1]] for lead in ("I", "aVR", "V1", "V4")]
    # 2.5 s at 25 mm/s, one after the other.
    np.testing.assert_allclose(np.diff([column[0] for column in columns]), 62.5)
    np.testing.assert_allclose([column[1] - column[0] for column in columns], 62.5 - 0.25)
    strip = lines(axes, "II")[1].get_xdata()
    assert strip[-1] - strip[0] == pytest.approx(249.75)


def test_columns_show_successive_pieces_of_time():
    signal = np.tile(np.arange(1000) / 1000.0, (12, 1))
    (axes,) = plots.ecg_paper(signal, 100).axes
    for lead, begin in (("III", 0), ("aVF", 250), ("V3", 500), ("V6", 750)):
        drawn = lines(axes, lead)[0].get_ydata()
        middle = lines(axes, "calibration pulse")[2].get_ydata()[0]
        np.testing.assert_allclose((drawn - middle) / 10, signal[0, begin : begin + 250] - np.median(signal[0]))


def test_scale_is_25_mm_a_second_and_10_mm_a_millivolt_in_true_size():
    figure = plots.ecg_paper(ecg(), 100)
    (axes,) = figure.axes
    width, height = axes.get_xlim()[1], axes.get_ylim()[1]
    np.testing.assert_allclose(figure.get_size_inches() * MM_PER_INCH, [width, height])
    pulse = lines(axes, "calibration pulse")[0]
    assert np.ptp(pulse.get_ydata()) == pytest.approx(10)
    assert np.ptp(pulse.get_xdata()[1:4]) == pytest.approx(5)
    assert np.ptp(lines(axes, "I")[0].get_ydata()) == pytest.approx(10)
    assert "25 mm/s   10 mm/mV" in " ".join(text.get_text() for text in axes.texts)
    assert width % 5 == height % 5 == 0


def test_paper_lines_stand_every_millimetre_in_the_pixels():
    # A row of pixels 2.5 mm below the upper edge, where no trace is, at 8 pixels a millimetre.
    figure = plots.ecg_paper(ecg() * 0, 100)
    row = pixels(figure, 8 * MM_PER_INCH)[20]
    away = np.abs(row - to_rgb(plots.PAPER)).sum(1)
    peaks = np.flatnonzero((away[1:-1] > away[:-2]) & (away[1:-1] >= away[2:]) & (away[1:-1] > 0.02)) + 1
    assert np.median(np.diff(peaks)) == 8
    strong = away[peaks] > np.median(away[peaks]) * 1.3
    assert np.median(np.diff(peaks[strong])) == 40
    # Pink: more red than green and blue, everywhere.
    assert (row[:, 0] >= row[:, 1]).all()


def test_short_records_stand_in_six_rows():
    (axes,) = plots.ecg_paper(ecg(seconds=5), 100).axes
    assert leads_drawn(axes) == ["I", "V1", "II", "V2", "III", "V3", "aVR", "V4", "aVL", "V5", "aVF", "V6", "II"]
    assert lines(axes, "V1")[0].get_xdata()[0] - lines(axes, "I")[0].get_xdata()[0] == pytest.approx(62.5)


@pytest.mark.parametrize(("leads", "seconds"), [(1, 0.01), (3, 4.0), (8, 10.0), (15, 30.0)])
def test_other_sets_of_leads_stand_below_each_other(leads, seconds):
    names = [f"lead {i}" for i in range(leads)]
    figure = plots.ecg_paper(ecg(seconds, leads=leads), 100, names)
    assert leads_drawn(figure.axes[0]) == names
    drawn = lines(figure.axes[0], names[0])[0].get_xdata()
    assert len(drawn) == min(round(seconds * 100), 1000)
    assert drawn[-1] < figure.axes[0].get_xlim()[1]


def test_leads_are_found_by_name_in_any_order():
    signal = np.outer(np.arange(12), np.sin(np.linspace(0, 60, 1000))) / 12
    shuffled = np.random.default_rng(0).permutation(12)
    straight = plots.ecg_paper(signal, 100).axes[0].get_lines()
    mixed = plots.ecg_paper(signal[shuffled], 100, [LEADS[i] for i in shuffled]).axes[0].get_lines()
    for a, b in zip(straight, mixed, strict=True):
        np.testing.assert_array_equal(a.get_ydata(), b.get_ydata())


@pytest.mark.parametrize(
    ("scale", "gain"), [(1.0, "10 mm/mV"), (4.0, "5 mm/mV"), (8.0, "2.5 mm/mV"), (100.0, "1.25 mm/mV")]
)
def test_large_waves_lower_the_gain_and_the_paper_says_so(scale, gain):
    wave = scale * np.sin(np.linspace(0, 60, 1000)) / 2 * np.ones((12, 1))
    (axes,) = plots.ecg_paper(wave, 100).axes
    assert any(f" {gain} " in text.get_text() for text in axes.texts)
    assert np.ptp(lines(axes, "calibration pulse")[0].get_ydata()) == pytest.approx(float(gain.split()[0]))


def test_scaled_units_fill_their_rows_and_are_not_called_millivolt():
    wave = np.sin(np.linspace(0, 60, 1000)) * np.ones((12, 1))
    (axes,) = plots.ecg_paper(wave, 100, unit="scaled").axes
    note = axes.texts[-1].get_text()
    assert "10 mm/unit (scaled, not mV)" in note
    (small,) = plots.ecg_paper(wave / 8, 100, unit="scaled").axes
    assert "20 mm/unit" in small.texts[-1].get_text()


def test_missing_samples_leave_gaps_and_flat_leads_are_flat():
    signal = ecg()
    signal[0, 100:120] = np.nan
    signal[3] = np.nan
    signal[4] = 7.0
    figure = plots.ecg_paper(signal, 100)
    (axes,) = figure.axes
    assert np.isnan(lines(axes, "I")[0].get_ydata()).sum() == 20
    assert np.isnan(lines(axes, "aVR")[0].get_ydata()).all()
    middle = lines(axes, "calibration pulse")[1].get_ydata()[0]
    assert (lines(axes, "aVL")[0].get_ydata() == middle).all()
    pixels(figure, 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(1000), 100), "signal must be \\[L, T\\]"),
        ((np.zeros((12, 0)), 100), "at least one lead and sample"),
        ((np.zeros((11, 100)), 100), "lead_names must be 11 names"),
        ((np.zeros((12, 100)), 0), "rate must be above 0 Hz"),
    ],
)
def test_wrong_signals_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        plots.ecg_paper(*arguments)


def test_real_recording_is_drawn_with_all_its_samples(shared_data):
    from hubert_ecg.data import read_record

    record = read_record(min((shared_data / "ptbxl" / "records500").rglob("*.hea")))
    signal, _ = record.standard_leads()
    (axes,) = plots.ecg_paper(signal, record.sampling_rate_hz).axes
    strip = lines(axes, "II")[1].get_ydata()
    want = signal[1].astype(np.float64)
    np.testing.assert_allclose(strip - strip[0], 10 * (want - want[0]), atol=1e-9)


def history():
    rows = [{"step": s, "epoch": s / 5, "split": "train", "loss": 1 / s, "lr": 1e-4} for s in range(1, 41)]
    rows += [{"step": s, "epoch": s / 5, "split": "validation", "loss": 2 / s} for s in (40, 20)]
    return pd.DataFrame(rows).assign(empty=np.nan, note="text")


def test_training_curves_have_a_panel_for_each_number_and_a_line_for_each_split():
    figure = plots.training_curves(history(), "Run")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "lr"]
    loss, rate = figure.axes
    assert [line.get_label() for line in loss.get_lines()] == ["train", "validation"]
    np.testing.assert_array_equal(loss.get_lines()[1].get_xdata(), [20, 40])
    np.testing.assert_array_equal(loss.get_lines()[1].get_ydata(), [0.1, 0.05])
    assert [line.get_label() for line in rate.get_lines()] == ["train"]


def test_training_curves_name_what_is_missing():
    with pytest.raises(ValueError, match="must have the columns step and split"):
        plots.training_curves(pd.DataFrame({"loss": [1.0]}))
    with pytest.raises(ValueError, match="must have a column of numbers"):
        plots.training_curves(pd.DataFrame({"step": [1], "split": ["train"]}))


def test_cluster_use_is_sorted_and_its_perplexity_right():
    figure = plots.cluster_use([1, 0, 4, 5])
    bars = figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx([50, 40, 10, 0])
    want = np.exp(-sum(p * np.log(p) for p in (0.5, 0.4, 0.1)))
    assert figure.axes[0].get_title(loc="left") == f"Perplexity {want:.1f} of 4 clusters, 1 unused"
    assert plots.perplexity(np.full(7, 3)) == pytest.approx(7)
    assert plots.perplexity([0, 9]) == 1
    with pytest.raises(ValueError, match="at least one token"):
        plots.cluster_use([0, 0])


def area(line):
    x, y = line.get_xdata(), line.get_ydata()
    return (np.diff(x) * (y[1:] + y[:-1]) / 2).sum()


def scored(num_labels, num_records=150):
    rng = np.random.default_rng(2)
    targets = rng.random((num_records, num_labels)) < 0.3
    return targets, targets * np.linspace(0, 3, num_labels) + rng.normal(size=targets.shape)


@pytest.mark.parametrize("draw", [plots.roc_curves, plots.pr_curves])
def test_curves_skip_undefined_labels_and_bound_the_legend(draw):
    targets, scores = scored(71)
    targets[:, 5] = 0
    names = [f"label {i}" for i in range(71)]
    (axes,) = draw(targets, scores, names).axes
    drawn = [label for label in leads_drawn(axes) if label.startswith("label")]
    assert len(drawn) == 70
    assert "label 5" not in drawn
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(legend) == 8
    assert "macro (70)" in legend[0]
    assert "64 more" in legend[4]
    values = [float(text[:5]) for text in legend[1:4] + legend[5:]]
    assert values == sorted(values, reverse=True)


def test_area_under_the_drawn_curves_is_the_metric():
    targets, scores = scored(3)
    (axes,) = plots.pr_curves(targets, scores, "abc").axes
    for c, name in enumerate("abc"):
        line = lines(axes, name)[0]
        x, y = line.get_xdata(), line.get_ydata()
        want = average_precision_score(targets[:, c], scores[:, c])
        assert (np.diff(x) * y[1:]).sum() == pytest.approx(want, abs=1e-12)
    mean = lines(axes, "macro")[0]
    want = average_precision_score(targets, scores)
    assert area(mean) == pytest.approx(want, abs=0.005)
    (axes,) = plots.roc_curves(targets, scores, "abc").axes
    mean = lines(axes, "macro")[0]
    legend = axes.get_legend().get_texts()[0].get_text()
    assert area(mean) == pytest.approx(float(legend[:5]), abs=0.005)


def test_no_defined_label_is_an_error():
    with pytest.raises(ValueError, match="must have a label with positives and negatives"):
        plots.roc_curves(np.zeros((4, 1)), np.zeros((4, 1)), ["a"])


def test_names_are_never_read_as_mathematics_or_hidden():
    targets, scores = scored(3)
    names = ["$\\frac{", "_hidden", "心房颤动 --> <script>"]
    figure = plots.roc_curves(targets, scores, names)
    legend = " ".join(text.get_text() for text in figure.axes[0].get_legend().get_texts())
    assert all(name in legend for name in names)
    ET.fromstring(plots.svg(figure, "a"))


def test_svg_is_well_formed_small_deterministic_and_has_ids_of_its_own():
    first, second = (plots.svg(plots.ecg_paper(ecg(), 100), prefix) for prefix in ("a", "b"))
    for text, prefix in ((first, "a-"), (second, "b-")):
        ids = [element.get("id") for element in ET.fromstring(text).iter() if element.get("id")]
        assert ids
        assert all(name.startswith(prefix) for name in ids)
    assert first == plots.svg(plots.ecg_paper(ecg(), 100), "a")
    assert len(first) < 400_000
    assert "<!--" not in first
    assert "var(--ink)" in plots.svg(plots.cluster_use([1, 2]), "c")


def test_figures_leave_the_settings_of_others_alone():
    with matplotlib.rc_context({"font.size": 33.0, "axes.grid": False}):
        figure = plots.cluster_use([1, 2])
        assert matplotlib.rcParams["font.size"] == 33.0
        assert figure.axes[0].xaxis.label.get_fontsize() < 12


def test_no_pyplot_and_nothing_heavy_on_import():
    code = (
        "import sys, hubert_ecg.evaluation as e\n"
        "assert not {'matplotlib', 'sklearn', 'pandas', 'jinja2'} & set(sys.modules)\n"
        "e.plots.svg(e.plots.cluster_use([1, 2]), 'a')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
