"""What users add without changing the package."""

from dataclasses import dataclass

from swift.config.option import option


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginConfig:
    external_plugins: tuple[str, ...] = option(
        (), "Python files that are run first: they register datasets, rewards, loss scales"
    )
    custom_dataset_info: tuple[str, ...] = option(
        (), "JSON files with a list of datasets: where each one is, its subsets and columns"
    )
