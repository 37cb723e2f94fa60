"""Images in: `data_manifest.yaml` -> proven tars -> blocks of decoded samples. `packing` makes tars."""
