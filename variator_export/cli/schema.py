"""`variator-export schema`."""

import json

import typer

from variator_export.recipe.recipe_file import recipe_schema


def schema_command() -> None:
    """Print the JSON schema of recipes, for completion and validation in editors.

    **Examples**

    `variator-export schema > recipe.schema.json`, and the first line of a recipe in the same folder:
    `# yaml-language-server: $schema=recipe.schema.json`
    """
    typer.echo(json.dumps(recipe_schema(), indent=2))
