"""What a card cites: the papers of the methods that a model was trained with, and this package."""

from . import __version__

REFERENCES = {
    "info_nce": {
        "key": "chen2020simple",
        "title": "A Simple Framework for Contrastive Learning of Visual Representations",
        "author": "Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey",
        "booktitle": "International Conference on Machine Learning",
        "year": 2020,
        "url": "https://arxiv.org/abs/2002.05709",
    },
    "siamese": {
        "key": "hadsell2006dimensionality",
        "title": "Dimensionality Reduction by Learning an Invariant Mapping",
        "author": "Hadsell, Raia and Chopra, Sumit and LeCun, Yann",
        "booktitle": "IEEE Conference on Computer Vision and Pattern Recognition",
        "year": 2006,
        "url": "https://doi.org/10.1109/CVPR.2006.100",
    },
    "simsiam": {
        "key": "chen2021exploring",
        "title": "Exploring Simple Siamese Representation Learning",
        "author": "Chen, Xinlei and He, Kaiming",
        "booktitle": "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
        "year": 2021,
        "url": "https://arxiv.org/abs/2011.10566",
    },
    "triplet": {
        "key": "schroff2015facenet",
        "title": "FaceNet: A Unified Embedding for Face Recognition and Clustering",
        "author": "Schroff, Florian and Kalenichenko, Dmitry and Philbin, James",
        "booktitle": "IEEE Conference on Computer Vision and Pattern Recognition",
        "year": 2015,
        "url": "https://arxiv.org/abs/1503.03832",
    },
    "prototypical": {
        "key": "snell2017prototypical",
        "title": "Prototypical Networks for Few-shot Learning",
        "author": "Snell, Jake and Swersky, Kevin and Zemel, Richard",
        "booktitle": "Advances in Neural Information Processing Systems",
        "year": 2017,
        "url": "https://arxiv.org/abs/1703.05175",
    },
    "cpc": {
        "key": "oord2018representation",
        "title": "Representation Learning with Contrastive Predictive Coding",
        "author": "van den Oord, Aaron and Li, Yazhe and Vinyals, Oriol",
        "year": 2018,
        "url": "https://arxiv.org/abs/1807.03748",
    },
    "wav2vec2": {
        "key": "baevski2020wav2vec",
        "title": "wav2vec 2.0: A Framework for Self-Supervised Learning of Speech Representations",
        "author": "Baevski, Alexei and Zhou, Henry and Mohamed, Abdelrahman and Auli, Michael",
        "booktitle": "Advances in Neural Information Processing Systems",
        "year": 2020,
        "url": "https://arxiv.org/abs/2006.11477",
    },
    "best_rq": {
        "key": "chiu2022self",
        "title": "Self-supervised Learning with Random-projection Quantizer for Speech Recognition",
        "author": "Chiu, Chung-Cheng and Qin, James and Zhang, Yu and Yu, Jiahui and Wu, Yonghui",
        "booktitle": "International Conference on Machine Learning",
        "year": 2022,
        "url": "https://arxiv.org/abs/2202.01855",
    },
    "hubert": {
        "key": "hsu2021hubert",
        "title": "HuBERT: Self-Supervised Speech Representation Learning by Masked Prediction of Hidden Units",
        "author": "Hsu, Wei-Ning and Bolte, Benjamin and Tsai, Yao-Hung Hubert and Lakhotia, Kushal and Salakhutdinov, "
        "Ruslan and Mohamed, Abdelrahman",
        "journal": "IEEE/ACM Transactions on Audio, Speech, and Language Processing",
        "year": 2021,
        "url": "https://arxiv.org/abs/2106.07447",
    },
    "data2vec": {
        "key": "baevski2022data2vec",
        "title": "data2vec: A General Framework for Self-supervised Learning in Speech, Vision and Language",
        "author": "Baevski, Alexei and Hsu, Wei-Ning and Xu, Qiantong and Babu, Arun and Gu, Jiatao and Auli, Michael",
        "booktitle": "International Conference on Machine Learning",
        "year": 2022,
        "url": "https://arxiv.org/abs/2202.03555",
    },
    "denoising": {
        "key": "vincent2008extracting",
        "title": "Extracting and Composing Robust Features with Denoising Autoencoders",
        "author": "Vincent, Pascal and Larochelle, Hugo and Bengio, Yoshua and Manzagol, Pierre-Antoine",
        "booktitle": "International Conference on Machine Learning",
        "year": 2008,
        "url": "https://doi.org/10.1145/1390156.1390294",
    },
    "masked_reconstruction": {
        "key": "liu2021tera",
        "title": "TERA: Self-Supervised Learning of Transformer Encoder Representation for Speech",
        "author": "Liu, Andy T. and Li, Shang-Wen and Lee, Hung-yi",
        "journal": "IEEE/ACM Transactions on Audio, Speech, and Language Processing",
        "year": 2021,
        "url": "https://arxiv.org/abs/2007.06028",
    },
    "ctc": {
        "key": "graves2006connectionist",
        "title": "Connectionist Temporal Classification: Labelling Unsegmented Sequence Data with Recurrent Neural "
        "Networks",
        "author": "Graves, Alex and Fern{\\'a}ndez, Santiago and Gomez, Faustino and Schmidhuber, J{\\\"u}rgen",
        "booktitle": "International Conference on Machine Learning",
        "year": 2006,
        "url": "https://doi.org/10.1145/1143844.1143891",
    },
    "pseudo_labels": {
        "key": "kahn2020self",
        "title": "Self-Training for End-to-End Speech Recognition",
        "author": "Kahn, Jacob and Lee, Ann and Hannun, Awni",
        "booktitle": "IEEE International Conference on Acoustics, Speech and Signal Processing",
        "year": 2020,
        "url": "https://arxiv.org/abs/1909.09116",
    },
    "hf_speechcl": {
        "key": "hf_speechcl",
        "title": "hf\\_speechcl: Self-supervised Speech Pre-training in the Hugging Face Ecosystem",
        "author": "{The hf\\_speechcl contributors}",
        "year": 2026,
        "version": __version__,
    },
}


def methods_of(objectives: dict[str, dict] | None) -> list[str]:
    """What is cited for objectives as `SpeechCLConfig.objectives` has them."""
    forms = {name: options.get("form") for name, options in (objectives or {}).items()}
    return ["simsiam" if form == "simsiam" else name for name, form in forms.items()]


def bibtex(methods: list[str]) -> str:
    """A fenced block of BibTeX entries for methods (objectives, "ctc" …) that have one, and for this package."""
    cited = [REFERENCES[name] for name in [*methods, "hf_speechcl"] if name in REFERENCES]
    return "\n".join(["```bibtex", *(_entry(**reference) for reference in cited), "```"])


def _entry(key: str, **fields) -> str:
    kind = "inproceedings" if "booktitle" in fields else "article" if "journal" in fields else "misc"
    lines = [f"  {name:9} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])
