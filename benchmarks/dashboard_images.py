"""Pictures of the dashboard for the documentation: a study is filled, served, and looked at with headless Chromium.

python -m benchmarks.dashboard_images                        # into docs/images
python -m benchmarks.dashboard_images --out /tmp/pictures
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import sync_playwright

from benchmarks.command import parser
from tests.browser.conftest import CHROMIUM
from tests.browser.shown_study import ShownStudy
from tests.browser.visits import Dashboard, served_dashboard

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
MOST_BYTES = 300_000
WIDE, PHONE = (1280, 860), (390, 844)


@dataclass(frozen=True)
class Shot:
    """One picture.

    Args:
        name: of its file.
        path: of the page.
        scheme: light or dark.
        size: of the window, in pixels.
        presses: buttons, one after the other.
        sees: text that is waited for.
    """

    name: str
    path: str
    sees: str
    scheme: str = "light"
    size: tuple[int, int] = WIDE
    presses: tuple[str, ...] = ()


SHOTS = (
    Shot("live", "/", "11 of 16 updates"),
    Shot("curves-dark", "/curves/masked", "on the validation set", scheme="dark"),
    Shot("fleet", "/fleet", "registered names"),
    Shot("device", "/fleet/w-00003", "What was done", presses=("Restore",)),
    Shot("models-dark", "/models/watch", "Rounds train", scheme="dark"),
    Shot("audit", "/audit", "checkpoint hold", presses=("Verify the whole log",)),
    Shot("refusals-phone", "/refusals", "since the study began", size=PHONE),
    Shot("live-phone-dark", "/", "11 of 16 updates", scheme="dark", size=PHONE),
)


def take(dashboard: Dashboard, shot: Shot, out: Path) -> int:
    """Take a picture; its size in bytes."""
    width, height = shot.size
    viewport = {"width": width, "height": height}
    visitor = dashboard.visitor(dashboard.study.tokens["operator"], viewport=viewport, color_scheme=shot.scheme)
    visitor.go(shot.path)
    for label in shot.presses:
        visitor.page.get_by_role("button", name=label).first.click()
    visitor.sees(shot.sees)
    visitor.page.wait_for_load_state("networkidle")
    visitor.page.wait_for_timeout(700)  # dialogs and bars move
    path = out / f"dashboard-{shot.name}.png"
    visitor.page.screenshot(path=path)
    visitor.page.context.close()
    dashboard.contexts.clear()
    return path.stat().st_size


def main() -> None:
    """Take all pictures, and say how large they are."""
    command = parser("dashboard_images", __doc__)
    command.add_argument("--out", type=Path, default=IMAGES, help="folder (default docs/images)")
    arguments = command.parse_args()
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        study = ShownStudy(Path(folder), devices=240)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with served_dashboard(study, browser) as dashboard:
            for shot in SHOTS:
                sizes[shot.name] = take(dashboard, shot, arguments.out)
        browser.close()
        study.store.close()
    if arguments.json:
        json.dump(sizes, sys.stdout, indent=2)
        print()
    else:
        for name, size in sizes.items():
            print(f"dashboard-{name}.png  {size / 1000:.0f} kB")
    sys.exit(1 if max(sizes.values()) > MOST_BYTES else 0)


if __name__ == "__main__":
    main()
