"""What lmms-eval finds under the entry-point group `lmms_eval.models`: the model name `roe_llava`."""

MODEL_NAME = "roe_llava"


def manifest():
    """lmms-eval's description of our model; the class is imported when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=MODEL_NAME,
        chat_class_path=f"{__package__}.harness_model.RoeLlavaHarness",
        aliases=("roe-llava", "moe_llava"),
    )


__all__ = ["MODEL_NAME", "manifest"]
