"""`python -m kvstore` is the command `kvstore`."""

import sys


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        from kvstore.errors import ConfigError, KVStoreError
        from kvstore.ops import serving

        arguments = serving.plain_arguments(sys.argv[2:])
        if arguments is not None:
            try:
                serving.run(**arguments)
            except KVStoreError as error:
                sys.stderr.write(f"kvstore: {error}\n")
                raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
            return
    from kvstore.cli import main as command

    command()


if __name__ == "__main__":
    main()
