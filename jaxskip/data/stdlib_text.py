"""The ``pysrc`` corpus as a TFDS builder: a real TFDS set that needs no network.

A module of its own because TFDS looks for a builder's files beside its module, and because it needs TFDS at import.
"""

import tensorflow_datasets as tfds

from jaxskip.data.texts import read_source, stdlib_files


class StdlibText(tfds.core.GeneratorBasedBuilder):
    """Source files of Python's standard library, one document each: features ``text`` and ``path``, one split.

    It keeps the files of the Python that prepared it. Give ``StdlibText(data_dir=...)`` to ``load_corpus`` or
    ``tfds_documents``, which prepare it when it is not there yet.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "path": tfds.features.Text()})
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for name, path in stdlib_files():
            yield name, {"text": read_source(path), "path": name}
