"""A real browser for the tests of draw(): found on the system, offline, without a window."""

import shutil

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.support.ui import WebDriverWait

DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1500,1000 --force-device-scale-factor=1"
)


def start(profile):
    """The driver of a new browser, which writes into the folder `profile` alone."""
    options = ChromeOptions()
    options.binary_location = BROWSER
    for argument in (*ARGUMENTS.split(), f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return Chrome(options=options, service=ChromeService(executable_path=DRIVER))


def show_page(browser, path):
    """Opens a page, and waits until its picture is there: on a busy machine `get` comes back before."""
    browser.get(path.as_uri())
    is_ready = "return document.body !== null && document.body.dataset.ready === 'true'"
    WebDriverWait(browser, 30, poll_frequency=0.02).until(lambda browser: browser.execute_script(is_ready))
