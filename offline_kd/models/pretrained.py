"""Weights that libraries offer for their networks, fetched by the libraries themselves."""

import urllib.error
import urllib.request


def fetch_pretrained(model: str) -> tuple[str | None, str]:
    """What a recipe calls the weights that a library offers for a network, now on this machine; None and why not."""
    source, _, name = model.partition(":")
    if source == "timm":
        import timm
        from huggingface_hub import constants, try_to_load_from_cache

        known = timm.get_pretrained_cfg(name)
        if known is None or not known.hf_hub_id:
            return None, "timm has no weights of it"
        # Without a network the library would try for a minute.
        if not _answers(constants.ENDPOINT):
            files = ("model.safetensors", "pytorch_model.bin")
            kept = any(isinstance(try_to_load_from_cache(known.hf_hub_id, file), str) for file in files)
            return ("pretrained", "") if kept else (None, "timm's weights are not here, and nothing is to be reached")
        try:
            timm.create_model(name, pretrained=True)
        except Exception as error:  # whatever the libraries between raise
            return None, f"timm's weights could not be had ({(str(error).splitlines() or [''])[0][:200]})"
        return "pretrained", ""
    if source == "torchvision":
        from torchvision import models

        try:
            weights = models.get_model_weights(name).DEFAULT
            weights.get_state_dict(progress=False)
        except (ValueError, AttributeError):
            return None, "torchvision has no weights of it"
        except OSError as error:
            return None, f"torchvision's weights could not be had ({error})"
        return str(weights), ""
    return None, "no library has weights of it"


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True
