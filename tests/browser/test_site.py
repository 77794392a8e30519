"""The documentation, as a browser shows it on a desk and on a phone."""

import functools
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tensorboard_page import browser, missing

import bn_callbacks

ROOT = Path(__file__).parents[2]

LOOK = """
const isBroken = (node, word) => {
  const range = document.createRange();
  range.setStart(node, word.index);
  range.setEnd(node, word.index + word[0].length);
  return new Set([...range.getClientRects()].map((place) => place.top)).size > 1;
};
const words = (node) =>
  [...node.textContent.matchAll(/[A-Za-z]{4,}/g)].filter((word) =>
    isBroken(node, word),
  );
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const broken = [];
while (texts.nextNode()) {
  const node = texts.currentNode;
  if (node.parentElement.closest(".md-content table, .md-content h1"))
    broken.push(...words(node).map((word) => word[0]));
}
return {
  broken,
  width: document.documentElement.scrollWidth,
  name: document.querySelector(".md-header__topic").innerText,
  missing: [...document.images]
    .filter((image) => !(image.complete && image.naturalWidth))
    .map((image) => image.src),
};
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation, built and served; its address, and the pages."""
    try:
        import mkdocs  # noqa: F401

        lacking = missing()
    except ModuleNotFoundError:
        lacking = "mkdocs"
    if lacking:
        (pytest.fail if os.environ.get("BN_CALLBACKS_CI") else pytest.skip)(lacking)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pages = sorted(
        path.parent.relative_to(folder) for path in folder.rglob("index.html")
    )
    yield f"http://127.0.0.1:{server.server_port}", pages
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_no_page_is_too_wide_or_breaks_words_or_lacks_a_picture(site, width, height):
    address, pages = site
    assert len(pages) > 25
    with browser() as driver:
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True},
        )
        for page in pages:
            driver.get(f"{address}/{page}/")
            seen = driver.execute_script(LOOK)
            assert seen["name"] == f"bn_callbacks {bn_callbacks.__version__}", page
            assert seen["width"] <= width, page
            assert (page, seen["broken"]) == (page, [])
            assert (page, seen["missing"]) == (page, [])
