"""Command lines whose mistakes are one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from cheaper.errors import UserError, did_you_mean


class ArgumentParser(argparse.ArgumentParser):
    """Raises ``UserError`` where argparse prints the whole usage."""

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [option for option in self._option_string_actions if option.startswith("--")]
            hint = did_you_mean(unknown[0].partition("=")[0], options)
            raise UserError(f"{self.prog} {unknown[0]}: no such argument{hint}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")
