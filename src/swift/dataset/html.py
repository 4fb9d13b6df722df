"""A page as one HTML file, through page.html.jinja."""

from jinja2 import Environment, PackageLoader

from swift.dataset.blocks import Page


def render_page(page: Page) -> str:
    """The whole file. All data is escaped, and nothing is fetched."""
    loader = PackageLoader("swift.dataset", "")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html.jinja").render(page=page)
