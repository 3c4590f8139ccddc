"""The page at `/docs`, made of the OpenAPI document without a script or any asset of others."""

from __future__ import annotations

import html
from typing import Any

from pydantic import BaseModel


def inline_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return a model's JSON schema with its definitions in place, so that it can stand anywhere."""
    schema = model.model_json_schema(by_alias=True)
    found: dict[str, Any] = _resolve(schema, schema.pop("$defs", {}))
    return found


def _resolve(part: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(part, list):
        return [_resolve(one, definitions) for one in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return _resolve(definitions[part["$ref"].rsplit("/", 1)[-1]], definitions)
    return {name: _resolve(value, definitions) for name, value in part.items()}


def docs_page(document: dict[str, Any]) -> str:
    """Return a page that lists the endpoints and the fields of their requests."""
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>{_text(document['info']['title'])} API</title></head><body><main>",
        f"<h1>{_text(document['info']['title'])} {_text(document['info']['version'])}</h1>",
        f"<p>{_text(document['info']['description'])} <a href='openapi.json'>The OpenAPI document</a></p>",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2>{method.upper()} {_text(path)}</h2><p>{_text(operation.get('summary', ''))}</p>")
            content = operation.get("requestBody", {}).get("content", {})
            for kind in content.values():
                parts.extend(map(_fields, kind["schema"].get("anyOf", [kind["schema"]])))
    return "".join([*parts, "</main></body></html>"])


def _fields(schema: dict[str, Any]) -> str:
    needed = schema.get("required", [])
    rows = [
        f"<tr><th scope=row><code>{_text(name)}</code></th><td>{_text(_kind(field))}"
        f"{', required' if name in needed else ''}</td><td>{_text(field.get('description', ''))}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    ]
    caption = _text(schema.get("description", schema.get("title", "")))
    return f"<table><caption>{caption}</caption><tbody>{''.join(rows)}</tbody></table>"


def _kind(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(one) for one in field["anyOf"] if one.get("type") != "null"))
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    return str(field.get("type", "any"))


def _text(value: Any) -> str:
    return html.escape(str(value))
