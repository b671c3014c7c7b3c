"""More than 8 bits per channel: what a range keeps, and the range that a message names."""

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smalti.cli import main
from smalti.data.dataset import DataOptions, read_options, write_options
from smalti.data.image_io import FolderOptions
from smalti.data.sources.base import ImageSource, open_source
from smalti.data.sources.folder import read_picture
from smalti.data.value_range import (
    Histogram,
    MeasuredRange,
    ValueCounts,
    check_range,
    common_range,
    limits_of,
    to_eight_bits,
    written,
)
from smalti.errors import SmaltiError
from tests.data.test_decoding import with_chunk
from tests.data.test_folder import handmade_png

CONVERT = FolderOptions(unusual_images="convert")
RAMP = np.linspace(0, 1, 40 * 36, dtype=np.float64).reshape(36, 40)
DEEP = {  # name -> stored values, and the range that fits them
    "12 bits.png": ((RAMP * 4095).astype(np.uint16), (0, 4095)),
    "8 bits in 16.png": ((RAMP * 255).astype(np.uint16), (0, 255)),
    "offset.png": ((30_000 + RAMP * 900).astype(np.uint16), (30_000, 30_900)),
    "negative.tif": ((RAMP * 2 - 1).astype(np.float32), (-1, 1)),
    "percent.tif": ((RAMP * 100 - 50).astype(np.float32), (-50, 50)),
    "hounsfield.tif": ((RAMP * 4000 - 1000).astype(np.int32), (-1000, 3000)),
}


def written_to(root: Path, name: str, values: np.ndarray) -> Path:
    """One more picture of the class red."""
    path = root / "red" / name
    if values.ndim == 3:
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        path.write_bytes(handmade_png(values.shape[1], values.shape[0], rows, depth=16))
    else:
        Image.fromarray(values).save(path)
    return path


def pixels_of(source: ImageSource, name: str) -> np.ndarray:
    (index,) = [i for i in range(len(source)) if source.name(i) == f"red/{name}"]
    return np.asarray(source.read(index))


@pytest.mark.parametrize("options", [CONVERT, FolderOptions()])
@pytest.mark.parametrize("name", DEEP)
def test_the_message_names_the_range_that_fits(
    pictures: Path, name: str, options: FolderOptions
) -> None:
    values, limits = DEEP[name]
    path = written_to(pictures, name, values)
    for refused in (
        lambda: open_source(str(pictures), options=options),
        lambda: read_picture(path, options),
    ):
        with pytest.raises(SmaltiError, match=re.escape(name)) as error:
            refused()
        named = re.search(r"--value_range (\S+) (\S+), which fits", str(error.value))
        assert named and tuple(map(float, named.groups())) == limits
        if options is CONVERT:
            assert re.search("grey levels of|of them lie outside the range", str(error.value))
    # The remedy, followed:
    source = open_source(str(pictures), options=options, value_range=limits)
    expected = np.floor(RAMP * 255 + 0.5)
    assert np.abs(pixels_of(source, name)[..., 0] - expected).max() <= 1


def test_the_full_range_of_a_type_needs_no_range(pictures: Path) -> None:
    written_to(pictures, "16 bits.png", (RAMP * 65535).astype(np.uint16))
    written_to(pictures, "floats.tif", RAMP.astype(np.float32))
    source = open_source(str(pictures), options=CONVERT)
    for name in ("16 bits.png", "floats.tif"):
        assert np.abs(pixels_of(source, name)[..., 1] - RAMP * 255).max() < 0.51


def test_a_given_range_that_clips_or_merges_levels_is_refused(pictures: Path) -> None:
    written_to(pictures, "deep.png", (RAMP * 4095).astype(np.uint16))
    with pytest.raises(SmaltiError, match=r"75.5% of them lie outside the range 0 1000.*0 4095"):
        open_source(str(pictures), value_range=(0, 1000))
    with pytest.raises(SmaltiError, match=r"range 0 65535 would leave 17 grey levels of 1440"):
        open_source(str(pictures), value_range=(0, 65535))
    with pytest.raises(SmaltiError, match="value_range is 9 9; give the value that is black"):
        open_source(str(pictures), value_range=(9, 9))
    with pytest.raises(SmaltiError, match="value_range is 9 1"):
        DataOptions(data=str(pictures), value_range=(9, 1))


def test_the_range_is_one_for_the_whole_set(pictures: Path) -> None:
    written_to(pictures, "a.png", (RAMP * 900).astype(np.uint16))
    written_to(pictures, "b.png", (RAMP * 4095).astype(np.uint16))
    with pytest.raises(
        SmaltiError, match=r"a.png.*no range fits the values of all 2 deep pictures"
    ):
        open_source(str(pictures), options=CONVERT)
    written_to(pictures, "a.png", (RAMP * 2000).astype(np.uint16))
    with pytest.raises(SmaltiError, match=r"--value_range 0 4095, .* of all 2 deep pictures"):
        open_source(str(pictures), options=CONVERT)
    assert len(open_source(str(pictures), value_range=(0, 4095))) == 26


def test_a_set_too_large_to_be_verified_refuses_what_it_reads(pictures: Path) -> None:
    written_to(pictures, "deep.png", DEEP["12 bits.png"][0])
    large = FolderOptions(unusual_images="convert", verify_up_to=0)
    source = open_source(str(pictures), options=large)
    with pytest.raises(SmaltiError, match=r"deep.png.*--value_range 0 4095"):
        pixels_of(source, "deep.png")
    source = open_source(str(pictures), options=large, value_range=(0, 4095))
    assert pixels_of(source, "deep.png").max() == 255


@pytest.mark.parametrize(
    ("distinct", "step", "fits"),
    [(1, 1, True), (2, 1, False), (2, 257, True), (50, 8, False), (50, 250, True), (65, 8, False)],
)
def test_pictures_with_few_values_keep_over_half_of_them(
    distinct: int, step: int, fits: bool
) -> None:
    values = (np.arange(distinct) * step).astype(np.uint16)
    assert (Histogram(values).problem((0, 65535)) is None) == fits


def test_a_few_defective_pixels_do_not_decide_the_range() -> None:
    values = (RAMP * 4095).astype(np.uint16).repeat(4, axis=0)
    values[0, 0] = 65535
    histogram = Histogram(values)
    assert histogram.problem((0, 4095)) is None  # 1 of 5,760 is clipped
    assert common_range([histogram.extent]) == (0, 4095)


def test_all_bits_of_16_bit_colour_are_used(pictures: Path) -> None:
    """Pillow reads the upper 8 bits alone."""
    values = np.stack([RAMP * 4095, 4095 - RAMP * 4095, RAMP * 0], axis=-1).astype(np.uint16)
    written_to(pictures, "colour.png", values)
    with pytest.raises(SmaltiError, match=r"colour.png is 16-bit.*--value_range 0 4095"):
        open_source(str(pictures), options=CONVERT)
    source = open_source(str(pictures), value_range=(0, 4095))
    assert np.array_equal(pixels_of(source, "colour.png"), to_eight_bits(values, (0, 4095)))
    assert len(np.unique(pixels_of(source, "colour.png"))) == 256


def test_alpha_of_16_bits_is_composited_on_white(tmp_path: Path) -> None:
    rows = (b"\0" + struct.pack(">HHHH", 65535, 0, 0, 32768) * 20) * 20
    png = bytearray(handmade_png(20, 20, rows, depth=16))
    png[25] = 6  # colour with alpha
    png[29:33] = struct.pack(">I", zlib.crc32(bytes(png[12:29])))
    (tmp_path / "a.png").write_bytes(png)
    assert read_picture(tmp_path / "a.png", CONVERT).getpixel((3, 3)) == (255, 127, 127)


def test_a_transparent_colour_of_16_bits_is_white(tmp_path: Path) -> None:
    colour = handmade_png(20, 20, (b"\0" + struct.pack(">HHH", 40000, 1, 2) * 20) * 20, depth=16)
    grey = handmade_png(20, 20, (b"\0" + struct.pack(">H", 40000) * 20) * 20, depth=16, kind=0)
    for content, key in ((colour, (40000, 1, 2)), (grey, (40000,))):
        for shift, expected in ((0, 255), (1, 156)):
            body = struct.pack(f">{len(key)}H", key[0] + shift, *key[1:])
            (tmp_path / "a.png").write_bytes(with_chunk(content, b"tRNS", body))
            assert read_picture(tmp_path / "a.png", CONVERT).getpixel((3, 3))[0] == expected


def test_values_that_are_not_finite_are_damage(pictures: Path) -> None:
    values = RAMP.astype(np.float32)
    values[3, 3] = np.nan
    written_to(pictures, "nan.tif", values)
    with pytest.raises(SmaltiError, match=r"nan.tif has values that are not finite: replace"):
        open_source(str(pictures), options=CONVERT)
    skip = FolderOptions(unusual_images="convert", bad_images="skip")
    assert len(open_source(str(pictures), options=skip)) == 24


def test_colour_in_a_16_bit_tiff_is_refused_where_its_lower_bits_matter(tmp_path: Path) -> None:
    values = np.stack([RAMP] * 3, axis=-1)
    for high, accepted in ((65535, True), (4095, False)):
        pixels = (values * high).astype("<u2").tobytes()
        path = tmp_path / f"{high}.tif"
        path.write_bytes(tiff_of_colour(40, 36, pixels))
        with pytest.raises(SmaltiError, match=r"16-bit colour in TIFF.*save it as 8-bit"):
            read_picture(path, FolderOptions())
        if accepted:
            image = np.asarray(read_picture(path, CONVERT))
            assert np.abs(image[..., 0] - RAMP * 255).max() <= 1
            assert np.array_equal(read_picture(path, FolderOptions(), (0, 65535)), image)
        else:
            with pytest.raises(SmaltiError, match=r"with 16 levels from 0 to 15: save it as 8-b"):
                read_picture(path, CONVERT)


def tiff_of_colour(width: int, height: int, pixels: bytes) -> bytes:
    """An uncompressed RGB TIFF with 16 bits per channel."""
    start = 8 + len(pixels)
    entries = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, 3, start + 2 + 9 * 12 + 4),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 8),
        (277, 3, 1, 3),
        (278, 3, 1, height),
        (279, 4, 1, len(pixels)),
    ]
    fields = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    directory = struct.pack("<H", len(entries)) + fields + struct.pack("<I", 0)
    return (
        b"II*\0" + struct.pack("<I", start) + pixels + directory + struct.pack("<HHH", 16, 16, 16)
    )


def test_check_data_names_the_range_and_follows_it(pictures: Path, tmp_path: Path, capsys) -> None:
    written_to(pictures, "deep.png", DEEP["12 bits.png"][0])
    listed = tmp_path / "bad.txt"
    flags = ["check-data", "--data", str(pictures), "--bad_files", str(listed)]
    assert main([*flags, "--folder.unusual_images", "convert"]) == 1
    assert "would leave 17 grey levels of 1440" in listed.read_text()
    out = capsys.readouterr().out
    assert (
        "1 pictures with more than 8 bits per channel, values from 0 to 4095: --value_range 0 4095 "
        "fits all" in out
    )
    assert main([*flags, "--value_range", "0", "4095"]) == 0
    (pictures / "red" / "deep.png").unlink()
    written_to(pictures, "negative.tif", DEEP["negative.tif"][0])
    assert main([*flags, "--value_range", "-1", "1"]) == 0
    assert main([*flags, "--value_range", "1", "-1"]) == 2
    assert "value_range is 1 -1" in capsys.readouterr().err


@pytest.mark.parametrize("limits", [(0, 1), (-1.5, 1e-5), (1e7, 2e9), (0.1, 0.30000001)])
def test_a_range_is_written_as_a_command_line_takes_it(limits: tuple[float, float]) -> None:
    text = written(limits)
    assert "e" not in text and tuple(map(float, text.split())) == pytest.approx(limits, rel=1e-8)


# -- Percentiles of a set -------------------------------------------------------------------------

PERCENTILES = ("0.5%", "99.5%")


def scans(root: Path, count: int = 4) -> list[np.ndarray]:
    """16-bit pictures with values about 1000 to 3000, and a few defective pixels."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        values = rng.integers(1000 + 50 * number, 3000, (36, 40)).astype(np.uint16)
        values[0, :2] = (0, 65_535)
        found.append(values)
        written_to(root, f"scan {number}.png", values)
    return found


def test_oracle_percentiles_are_those_of_all_values(pictures: Path, caplog) -> None:
    """Of all values of all deep pictures, not of each picture; 8-bit pictures do not count."""
    caplog.set_level("INFO")
    values = np.concatenate([scan.ravel() for scan in scans(pictures)])
    low, high = np.percentile(values, (0.5, 99.5), method="inverted_cdf")
    source = open_source(str(pictures), value_range=PERCENTILES)
    assert f"value_range 0.5% 99.5% of 4 deep pictures: {low} is black and {high} white" in (
        caplog.text
    )
    clipped = np.mean((values < low) | (values > high))
    assert f"{clipped:.2%} of the values are clipped, and 256 grey levels remain" in caplog.text
    scan = scans(pictures)[2]
    expected = to_eight_bits(scan, (float(low), float(high)))
    assert np.array_equal(pixels_of(source, "scan 2.png")[..., 0], expected)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_oracle_percentiles_of_other_types_are_within_a_twentieth_of_a_percent(dtype) -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((5, 200, 200)) * 30_000).astype(dtype)
    counts = ValueCounts()
    for picture in values:
        counts.add(picture)
    found, _, levels = counts.measured(("1%", "90%"))
    measured = limits_of(found)
    assert isinstance(measured, MeasuredRange) and levels == 256 and counts.pictures == 5
    np.testing.assert_allclose(measured, np.percentile(values, (1, 90)), rtol=1e-3)


def test_simple_numbers_are_measured_exactly() -> None:
    counts = ValueCounts()
    counts.add(np.array([-1.0, 0.0, 0.5, 1.0], np.float32))
    assert counts.measured(("0%", "100%"))[0] == ("0%=-1", "100%=1")
    counts.add(np.array([0, 4095, 65_535], np.uint16))
    assert counts.measured(("0%", "100%"))[0] == ("0%=-1", "100%=65535")


def test_what_was_measured_is_stored_and_not_measured_again(
    pictures: Path, tmp_path: Path, monkeypatch
) -> None:
    scans(pictures)
    options = DataOptions(data=str(pictures), value_range=PERCENTILES)
    source = options.source()
    monkeypatch.setattr("smalti.data.sources.base.measured_over", None)  # it would fail
    options.source()  # the other split, in the same process
    (tmp_path / "model").mkdir()
    write_options(tmp_path / "model", options)
    stored = read_options(tmp_path / "model")
    assert stored is not None
    low, high = stored.value_range
    assert re.fullmatch(r"0\.5%=\d+", low) and re.fullmatch(r"99\.5%=\d+", high)
    assert stored.source().fingerprint == source.fingerprint
    plain = limits_of(stored.value_range)
    assert plain == MeasuredRange((float(low.split("=")[1]), float(high.split("=")[1])))


def test_few_grey_levels_are_counted_and_named(pictures: Path, caplog) -> None:
    written_to(pictures, "wide.png", (RAMP * 60_000).astype(np.uint16))
    written_to(pictures, "dim.png", (RAMP * 600).astype(np.uint16))  # 600 of 60,000
    open_source(str(pictures), value_range=("0%", "100%"))
    assert "leaves fewer than 64 grey levels in 1 of 2 deep pictures; the fewest, 4 of" in (
        caplog.text
    )
    assert "dim.png" in caplog.text


@pytest.mark.parametrize(
    ("value_range", "message"),
    [
        (("0.5%", 4095), "give two numbers, or two percentiles such as 0.5% 99.5%"),
        (("0.5%=3", "99%"), "give two numbers, or two percentiles"),
        (("low", "high"), "give two numbers, or two percentiles"),
        (("99%", "1%"), "give the percentile that is black, then the larger one"),
        (("1%", "101%"), "at most 100%"),
        (("1%=e", "99%=7"), "give two numbers, or two percentiles"),
        (("1%=7", "99%=7"), "the value that is black must be below the one that is white"),
        ((5.0, 5.0), "give the value that is black, then the larger one"),
    ],
)
def test_impossible_ranges_are_refused(value_range, message: str) -> None:
    with pytest.raises(SmaltiError, match=re.escape(message)):
        check_range(value_range)


def test_percentiles_need_deep_pictures_that_differ(pictures: Path) -> None:
    with pytest.raises(SmaltiError, match="no picture has more than 8 bits per channel: leave it"):
        open_source(str(pictures), value_range=PERCENTILES)
    with pytest.raises(SmaltiError, match="have 8 bits per channel: leave it out"):
        open_source("emoji", value_range=PERCENTILES)
    written_to(pictures, "flat.png", np.full((36, 40), 700, np.uint16))
    with pytest.raises(SmaltiError, match="both are the value 700: choose percentiles further"):
        open_source(str(pictures), value_range=PERCENTILES)


def test_percentiles_are_given_on_the_command_line(pictures: Path, capsys) -> None:
    scans(pictures)
    assert main(["check-data", "--data", str(pictures), "--value_range", "0.5%", "99.5%"]) == 0
    assert (
        main(["check-data", "--data", str(pictures), "--value_range", "0.5%=1000", "99.5%=2990"])
        == 0
    )


def test_a_range_without_deep_pictures_has_no_effect_and_says_so(tmp_path: Path, caplog) -> None:
    (tmp_path / "red").mkdir()
    Image.new("RGB", (40, 36), (9, 9, 9)).save(tmp_path / "red" / "8.png")
    np.savez(tmp_path / "set.npz", images=np.zeros((3, 36, 40, 3), np.uint8))
    said = "value_range has no effect on"
    for data in (f"{tmp_path}/red", f"{tmp_path}/set.npz"):
        caplog.clear()
        open_source(data, value_range=(0, 4095))
        assert caplog.text.count(f"{said} {data}, whose pictures have 8 bits") == 1
        caplog.clear()
        open_source(data)  # the remedy
        assert said not in caplog.text
    written_to(tmp_path, "deep.png", DEEP["12 bits.png"][0])
    open_source(f"{tmp_path}/red", value_range=(0, 4095))
    assert said not in caplog.text


def test_check_data_names_a_range_without_effect(tmp_path: Path, capsys) -> None:
    (tmp_path / "red").mkdir()
    Image.new("RGB", (40, 36), (9, 9, 9)).save(tmp_path / "red" / "8.png")
    main(["check-data", "--data", str(tmp_path / "red"), "--value_range", "0", "4095"])
    assert capsys.readouterr().out.count("note: value_range has no effect on") == 1
