"""The one decoder: files of every kind give the same pixels in training, in evaluation,
in ``encode_image``; crops.
"""

import io
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageCms, ImageStat
from torch.distributions import Uniform
from torchvision.transforms import RandomResizedCrop

from cloob import pictures
from cloob.data.loader import PicturePairs
from cloob.data.transforms import TrainTransform, crop_box, resize
from cloob.errors import InputError
from cloob.evaluation.embed import embed_images
from cloob.models.towers import create_model
from make import Listed, code_points, encoded, noise_image
from support import raises, seeded

SIDE = 64
ORIENTATION = 0x0112
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
# the transposition that makes the stored picture of the upright one: the inverse of
# what EXIF asks for
Turn = Image.Transpose
STORED = {
    1: None,
    2: Turn.FLIP_LEFT_RIGHT,
    3: Turn.ROTATE_180,
    4: Turn.FLIP_TOP_BOTTOM,
    5: Turn.TRANSPOSE,
    6: Turn.ROTATE_90,
    7: Turn.TRANSVERSE,
    8: Turn.ROTATE_270,
}


def one(data):
    """A list of one sample, as training and evaluation read it."""
    return Listed([(data, "a caption")])


@pytest.fixture(scope="module")
def encoder():
    return create_model("tiny-vit", seed=0).eval()


def upright(width=SIDE, height=SIDE):
    """A smooth picture that no turn maps onto itself."""
    small = noise_image(7, 4, 3)
    return small.resize((width, height), Image.Resampling.BICUBIC)


def turned(image, orientation, kind, **options):
    """The file of a picture that is stored turned, and says so."""
    method = STORED[orientation]
    stored = image if method is None else image.transpose(method)
    return encoded(stored, kind, exif=exif_of(orientation), **options)


def exif_of(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif.tobytes()


def without_adobe(jpeg):
    """The same CMYK JPEG without Adobe's marker."""
    at = jpeg.index(b"\xff\xee")
    length = int.from_bytes(jpeg[at + 2 : at + 4], "big")
    end = at + 2 + length
    return jpeg[:at] + jpeg[end:]


def difference(pixels, others):
    """The largest of two pictures, in levels."""
    return np.abs(np.asarray(pixels, int) - np.asarray(others, int)).max()


def zoo():
    """Name, file, and the RGB pixels that it shows."""
    rgb = upright()
    colours = np.asarray(rgb)
    grey = rgb.convert("L")
    levels = np.asarray(grey)
    greys = np.repeat(levels[..., None], 3, 2)
    brightened = greys * (255 / greys.max())
    yield "grey", encoded(grey), greys
    wide = Image.fromarray(levels.astype(np.int32) * 2**23)
    yield "grey of 32 bits", encoded(wide, "TIFF"), brightened
    wide = Image.fromarray(levels / np.float32(255))
    yield "floating-point grey", encoded(wide, "TIFF"), brightened
    bits = grey.convert("1", dither=Image.Dither.NONE)
    yield "1 bit", encoded(bits), np.where(greys > 127, 255, 0)

    alpha = Image.new("L", rgb.size)
    alpha.paste(255, (0, 0, SIDE // 2, SIDE))
    is_seen = np.asarray(alpha)[..., None] > 0
    clear = np.where(is_seen, colours, 255)
    layer = rgb.copy()
    layer.putalpha(alpha)
    yield "alpha", encoded(layer), clear
    layer = grey.copy()
    layer.putalpha(alpha)
    yield "grey with alpha", encoded(layer), np.where(is_seen, greys, 255)

    palette = rgb.quantize(32)
    shown = np.asarray(palette.convert("RGB"))
    hole = np.where(np.asarray(palette)[..., None] == 5, 255, shown)
    yield "palette with a clear colour", encoded(palette, transparency=5), hole
    alphas = b"\xff\xff\xff\xff\xff\0".ljust(32, b"\xff")
    yield "palette with an alpha each", encoded(palette, transparency=alphas), hole

    moves = {"save_all": True, "append_images": [rgb.rotate(90)]}
    yield "GIF that moves", encoded(palette, "GIF", **moves), shown
    yield "WebP that moves", encoded(rgb, "WEBP", lossless=True, **moves), colours
    yield "PNG that moves", encoded(rgb, **moves), colours

    whole = {"quality": 98, "subsampling": 0}
    cmyk = encoded(rgb.convert("CMYK"), "JPEG", **whole)
    yield "CMYK by Adobe", cmyk, colours
    yield "CMYK without its marker", without_adobe(cmyk), colours
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    yield "colour profile", encoded(rgb, icc_profile=lab), colours

    damaged = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0\x12"
    yield "damaged EXIF", encoded(rgb, exif=damaged), colours
    yield "orientation 9", encoded(rgb, exif=exif_of(9)), colours
    for orientation in STORED:
        jpeg = turned(rgb, orientation, "JPEG", **whole)
        yield f"JPEG turned {orientation}", jpeg, colours
    yield "PNG turned", turned(rgb, 6, "PNG"), colours
    yield "TIFF turned", turned(rgb, 6, "TIFF"), colours
    yield "WebP turned", turned(rgb, 6, "WEBP", lossless=True), colours
    stored = encoded(rgb, "JPEG", **whole)
    yield "JPEG turned by XMP alone", with_xmp(stored), colours


def batch_of(data, transform):
    """The one sample as training reads it."""
    pairs = PicturePairs(one(data), transform, code_points)
    return pairs.batch(np.array([0]))


def trained_on(data):
    """The pixels that training takes with a crop of everything, (H, W, 3)."""
    batch = batch_of(data, TrainTransform(SIDE, scale=(1, 1)))
    assert not batch.skipped
    return batch.images[0].permute(1, 2, 0)


def with_xmp(jpeg):
    """The same JPEG with a record that asks for a turn."""
    xmp = b"http://ns.adobe.com/xap/1.0/\0<rdf:RDF><tiff:Orientation>6</tiff:Orientation></rdf:RDF>"
    length = len(xmp) + 2
    record = b"\xff\xe1" + length.to_bytes(2, "big") + xmp
    return jpeg[:2] + record + jpeg[2:]


@pytest.mark.parametrize(
    ("data", "shows"), [pytest.param(*rest, id=name) for name, *rest in zoo()]
)
def test_the_zoo(data, shows, encoder, tmp_path):
    image = pictures.decode(data)
    pixels = np.asarray(image, dtype=float)
    assert image.mode == "RGB"
    is_jpeg = data.startswith(b"\xff\xd8")
    largest = np.abs(pixels - shows).max()
    assert largest <= (12 if is_jpeg else 1)
    assert np.array_equal(trained_on(data).numpy(), pixels)
    path = tmp_path / "picture"
    path.write_bytes(data)
    with torch.no_grad():
        expected = encoder.encode_image(encoder.preprocess(image)[None])
        with Image.open(path) as opened:
            for given in (path, opened):
                assert torch.equal(encoder.encode_image([given]), expected)
    assert torch.equal(embed_images(encoder, one(data)).features, expected)


@pytest.mark.parametrize("orientation", STORED)
def test_the_size_of_a_file_is_that_of_the_upright_picture(orientation):
    data = turned(upright(101, 77), orientation, "PNG")
    file = pictures.Encoded(data)
    assert file.size == (101, 77)
    assert file.rgb().size == (101, 77)


@pytest.mark.parametrize("reduction", [1, 8])
def test_a_huge_jpeg_is_decoded_smaller(monkeypatch, reduction):
    image = upright(641, 479)
    data = turned(image, 6, "JPEG", quality=95)
    monkeypatch.setattr(pictures, "WHOLE_PIXELS", 320 * 240 + 1000)
    file = pictures.Encoded(data)
    half = (321, 240)
    assert file.size == half
    assert file.stored == (240, 321)
    assert file.full_size == (641, 479)
    assert file.in_file == (479, 641)
    # of what is left: the file gives an eighth at the least
    quarter = (81, 60)
    assert file.rgb(reduction).size == (half if reduction == 1 else quarter)
    whole_pixels = (0, 0, 320, 239)
    expected = image.resize(half, Image.Resampling.BOX).crop(whole_pixels)
    shown = pictures.decode(data).crop(whole_pixels)
    differences = ImageChops.difference(shown, expected)
    assert max(ImageStat.Stat(differences).mean) < 2


def test_a_crop_of_a_huge_turned_jpeg_is_one_of_the_smaller_picture(monkeypatch):
    image = upright(640, 480)
    data = turned(image, 6, "JPEG", quality=95)
    monkeypatch.setattr(pictures, "WHOLE_PIXELS", 320 * 240 + 1000)
    transform = TrainTransform(16, scale=(0.8, 1.0))
    file = pictures.Encoded(data)
    crop = transform.draw(*file.size, seeded(1), file.max_reduction)
    # an eighth of a half would do, but the file gives an eighth at the least
    assert file.size == (320, 240)
    assert crop.reduction == 4
    found = transform.take(file.rgb(crop.reduction), crop)
    expected = transform(image.resize(file.size), seeded(1))
    differences = found.float() - expected.float()
    assert differences.abs().mean() < 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_comes_out_as_small_as_it_is_asked_for(mode, progressive):
    image = noise_image(0, 67, 45).convert(mode)
    data = encoded(image, "JPEG", progressive=progressive)
    assert pictures.Encoded(data).max_reduction == 8
    for factor, size in ((1, (67, 45)), (2, (34, 23)), (4, (17, 12)), (8, (9, 6))):
        assert pictures.Encoded(data).rgb(factor).size == size
    png = encoded(image.convert("RGB"))
    assert pictures.Encoded(png).max_reduction == 1


def test_of_grey_of_16_bits_the_high_byte_counts():
    values = np.arange(0, 65536, 7, dtype=np.uint16)[None]
    image = pictures.upright(Image.fromarray(values))
    red, _, _ = image.split()
    assert np.array_equal(np.asarray(red), values >> 8)


def test_one_limit_everywhere(monkeypatch, encoder, tmp_path):
    """A bomb is refused by its header, whoever reads it."""
    image = upright()
    data = encoded(image)
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(data)
    monkeypatch.setattr(pictures, "MAX_PIXELS", SIDE * SIDE - 1)
    (skip,) = batch_of(data, TrainTransform(SIDE)).skipped
    assert skip.key == "0"
    assert skip.reason == "image too large"
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    message = r"bomb\.png: .*64×64 pixels, the limit is 4,095"
    raises(InputError, message, encoder.encode_image, [bomb])
    raises(InputError, r"an image of 64×64 pixels: ", encoder.encode_image, [image])
    message = r"none of the 1 images can be read.*image too large"
    raises(InputError, message, embed_images, encoder, one(data))


def test_no_other_program_decodes(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript."""
    eps = encoded(upright(), "EPS")
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pictures.Unreadable) as caught:
        pictures.decode(eps)
    assert caught.value.detail.endswith("not an image file")
    assert not (tmp_path / "ran").exists()


def test_a_format_without_its_package_names_what_to_install(
    monkeypatch, encoder, tmp_path
):
    monkeypatch.setitem(sys.modules, "pillow_heif.HeifImagePlugin", None)
    path = tmp_path / "IMG_1.HEIC"
    path.write_bytes(HEIC)
    said = r"IMG_1\.HEIC: .*pip install pillow-heif"
    raises(InputError, said, encoder.encode_image, [path])


@pytest.mark.parametrize("start", pictures._UNBOUNDED)
def test_formats_without_a_bound_are_not_decoded(start):
    raises(pictures.Unreadable, "convert it", pictures.decode, start + bytes(90))


def test_a_progressive_jpeg_that_lacks_its_end_is_taken():
    data = encoded(noise_image(0, 640, 480), "JPEG", progressive=True)
    file = pictures.Encoded(data[:-30])
    assert file.rgb().size == (640, 480)
    assert file.truncated


def test_heic():
    heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    stored = heif.from_pillow(upright().transpose(STORED[6]))
    stored.save(file, quality=100, chroma=444, exif=exif_of(6))
    data = file.getvalue()
    image = pictures.decode(data)
    assert difference(image, upright()) <= 12
    assert np.array_equal(trained_on(data).numpy(), np.asarray(image))


# Crops


@pytest.mark.parametrize(("height", "width"), [(300, 200), (40, 400)])
def test_crops_are_distributed_as_torchvisions(height, width):
    """Means of the box over many draws agree within five standard errors."""
    n = 4000
    scale = [0.2, 0.8]
    ratio = [3 / 4, 4 / 3]
    blank = torch.empty(3, height, width)
    torch.manual_seed(0)
    get_params = RandomResizedCrop.get_params
    theirs = np.array([get_params(blank, scale, ratio) for _ in range(n)], float)
    draws = Uniform(0.0, 1.0).sample((n, 22)).double().tolist()
    boxes = [crop_box(height, width, scale, ratio, draw) for draw in draws]
    ours = np.array(boxes, float)
    variances = theirs.var(0) + ours.var(0)
    errors = np.sqrt(variances / n)
    differences = np.abs(theirs.mean(0) - ours.mean(0))
    assert (differences <= 5 * errors + 1e-9).all()


@pytest.mark.parametrize(
    ("width", "height", "size"), [(64, 64, 64), (500, 375, 224), (20, 30, 64)]
)
def test_resize_is_pillows_bicubic_within_one_level(width, height, size):
    image = noise_image(0, width, height)
    theirs = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    ours = resize(pixels, size)
    assert ours.dtype == torch.uint8
    assert difference(ours.permute(1, 2, 0), theirs) <= 1


def test_flip_is_off_by_default_and_mirrors_half_of_the_time():
    image = noise_image(0, 16, 16)
    plain = TrainTransform(16, scale=(1.0, 1.0))
    flipping = TrainTransform(16, scale=(1.0, 1.0), flip=True)
    flips = 0
    for seed in range(200):
        expected = plain(image, seeded(seed))
        found = flipping(image, seeded(seed))
        if not torch.equal(found, expected):
            flips += 1
            assert torch.equal(found, expected.flip(-1))
    assert 70 <= flips <= 130


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(1, 300),
    st.floats(0.01, 1),
    st.integers(0, 9),
)
def test_a_reduced_crop_has_enough_pixels_and_lies_on_whole_ones(
    width, height, size, low, seed
):
    transform = TrainTransform(size, scale=(low, 1.0))
    crop = transform.draw(width, height, seeded(seed), 8)
    exact = transform.draw(width, height, seeded(seed))
    r = crop.reduction
    assert r in (1, 2, 4, 8)
    assert exact.reduction == 1
    for value in crop[:4]:
        assert value % r == 0
    if r > 1:
        assert min(crop.height, crop.width) // r >= size
    if r < 8:  # and the next factor would be too much
        shorter = min(exact.height, exact.width)
        assert shorter // (2 * r) < size
    # Each edge moves by less than one pixel of the result.
    for start, length in ((0, 2), (1, 3)):
        pixel = max(1, exact[length] / size)
        assert 0 <= exact[start] - crop[start] < pixel
        assert 0 <= exact[length] - crop[length] < pixel
    for box in (crop, exact):
        assert min(box.height, box.width) >= 1
        assert min(box.top, box.left) >= 0
        assert box.top + box.height <= height
        assert box.left + box.width <= width


def test_a_jpeg_of_several_pictures_is_its_first():
    first = Image.new("RGB", (64, 48), (250, 0, 0))
    second = Image.new("RGB", (64, 48), (0, 0, 250))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    for reduction in (1, 4):
        image = pictures.Encoded(data).rgb(reduction)
        assert image.size == (64 // reduction, 48 // reduction)
        red, _, _ = image.getpixel((2, 2))
        assert red > 200


@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {}), ("L", {}), ("CMYK", {}), ("RGB", {"subsampling": 0})],
)
def test_a_jpeg_that_lacks_its_end_is_taken(mode, options):
    """What is there is as it was; what is missing is grey, a tenth of the rows at
    most.
    """
    image = noise_image(0, 640, 480).convert(mode)
    data = encoded(image, "JPEG", quality=90, **options)
    whole = np.asarray(pictures.decode(data))
    for end in (1, 2, 30, len(data) // 20):
        file = pictures.Encoded(data[:-end])
        found = np.asarray(file.rgb())
        assert file.truncated or end <= 2
        assert np.array_equal(found[:432], whole[:432])
        assert end > 2 or np.array_equal(found, whole)
        small = pictures.Encoded(data[:-end]).rgb(4)
        assert small.size == (160, 120)
    message = r"2\d% of its rows missing"
    cut = data[: len(data) * 3 // 4]
    raises(pictures.Unreadable, message, pictures.decode, cut)
    file = pictures.Encoded(data)
    file.rgb()
    assert not file.truncated
