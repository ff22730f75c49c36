"""Only what pyproject.toml cannot say: recipes and targets lie at the repository's top level.

export/ and engines/ become `trio_deploy/recipes` and `trio_deploy/targets` in the wheel.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(
            include=["trio_deploy", "trio_deploy.*"], exclude=["*.__pycache__"]
        ),
        "trio_deploy.recipes",
        "trio_deploy.targets",
    ],
    package_dir={"trio_deploy.recipes": "export", "trio_deploy.targets": "engines"},
)
