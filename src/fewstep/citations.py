"""BibTeX entries of the papers behind the library, by key; :func:`bibtex` prints those a run used.

Papers on arXiv carry their number as ``eprint``; no other address is written.
"""

from __future__ import annotations

from collections.abc import Iterable

from fewstep.errors import unknown

__all__ = ["CITATIONS", "bibtex", "short_reference"]

# key: (kind, authors, title, where it appeared, year, arXiv number or None)
# where it appeared: a conference (inproceedings), a journal with volume and pages (article), "" (misc)
Entry = tuple[str, str, str, str, int, str | None]

_ICLR = "International Conference on Learning Representations"
_ICML = "International Conference on Machine Learning"
_NEURIPS = "Advances in Neural Information Processing Systems"

CITATIONS: dict[str, Entry] = {
    "alain2014regularized": (
        "article",
        "Alain, Guillaume and Bengio, Yoshua",
        "What Regularized Auto-Encoders Learn from the Data-Generating Distribution",
        "Journal of Machine Learning Research",
        2014,
        "1211.4246",
    ),
    "albergo2023building": (
        "inproceedings",
        "Albergo, Michael S. and Vanden-Eijnden, Eric",
        "Building Normalizing Flows with Stochastic Interpolants",
        _ICLR,
        2023,
        "2209.15571",
    ),
    "boffi2025build": (
        "misc",
        "Boffi, Nicholas M. and Albergo, Michael S. and Vanden-Eijnden, Eric",
        "How to build a consistency model: Learning flow maps via self-distillation",
        "",
        2025,
        "2505.18825",
    ),
    "boffi2025flow": (
        "article",
        "Boffi, Nicholas M. and Albergo, Michael S. and Vanden-Eijnden, Eric",
        "Flow map matching with stochastic interpolants: A mathematical framework for consistency models",
        "Transactions on Machine Learning Research",
        2025,
        "2406.07507",
    ),
    "bonneel2015sliced": (
        "article",
        "Bonneel, Nicolas and Rabin, Julien and Peyr{\\'e}, Gabriel and Pfister, Hanspeter",
        "Sliced and {R}adon {W}asserstein Barycenters of Measures",
        "Journal of Mathematical Imaging and Vision, 51(1), 22--45",
        2015,
        None,
    ),
    "dormand1980family": (
        "article",
        "Dormand, J. R. and Prince, P. J.",
        "A family of embedded {R}unge--{K}utta formulae",
        "Journal of Computational and Applied Mathematics, 6(1), 19--26",
        1980,
        None,
    ),
    "esser2024scaling": (
        "inproceedings",
        "Esser, Patrick and Kulal, Sumith and Blattmann, Andreas and Entezari, Rahim and "
        'M{\\"u}ller, Jonas and '
        "Saini, Harry and Levi, Yam and Lorenz, Dominik and Sauer, Axel and Boesel, Frederic and Podell, "
        "Dustin and Dockhorn, Tim and English, Zion and Lacey, Kyle and Goodwin, Alex and Marek, Yannik "
        "and Rombach, Robin",
        "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
        _ICML,
        2024,
        "2403.03206",
    ),
    "frans2025one": (
        "inproceedings",
        "Frans, Kevin and Hafner, Danijar and Levine, Sergey and Abbeel, Pieter",
        "One Step Diffusion via Shortcut Models",
        _ICLR,
        2025,
        "2410.12557",
    ),
    "geng2025consistency": (
        "inproceedings",
        "Geng, Zhengyang and Pokle, Ashwini and Luo, William and Lin, Justin and Kolter, J. Zico",
        "Consistency Models Made Easy",
        _ICLR,
        2025,
        "2406.14548",
    ),
    "geng2025mean": (
        "inproceedings",
        "Geng, Zhengyang and Deng, Mingyang and Bai, Xingjian and Kolter, J. Zico and He, Kaiming",
        "Mean Flows for One-step Generative Modeling",
        _NEURIPS,
        2025,
        "2505.13447",
    ),
    "guo2025splitmeanflow": (
        "misc",
        "Guo, Yi and Wang, Wei and Yuan, Zhihang and Cao, Rong and Chen, Kuan and Chen, Zhengyang and Huo, Yuanyuan "
        "and Zhang, Yang and Wang, Yuping and Liu, Shouda and Wang, Yuxuan",
        "{SplitMeanFlow}: Interval Splitting Consistency in Few-Step Generative Modeling",
        "",
        2025,
        "2507.16884",
    ),
    "heusel2017gans": (
        "inproceedings",
        "Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp",
        "{GAN}s Trained by a Two Time-Scale Update Rule Converge to a Local {N}ash Equilibrium",
        _NEURIPS,
        2017,
        "1706.08500",
    ),
    "ho2022classifier": (
        "misc",
        "Ho, Jonathan and Salimans, Tim",
        "Classifier-Free Diffusion Guidance",
        "",
        2022,
        "2207.12598",
    ),
    "huang2024flow": (
        "misc",
        "Huang, Zemin and Geng, Zhengyang and Luo, Weijian and Qi, Guo-Jun",
        "Flow Generator Matching",
        "",
        2024,
        "2410.19310",
    ),
    "kim2025simple": (
        "inproceedings",
        "Kim, Beomsu and Hsieh, Yu-Guan and Klein, Michal and Cuturi, Marco and Ye, Jong Chul and Kawar, "
        "Bahjat and Thornton, James",
        "Simple {R}e{F}low: Improved Techniques for Fast Flow Models",
        _ICLR,
        2025,
        "2410.07815",
    ),
    "kynkaanniemi2019improved": (
        "inproceedings",
        'Kynk{\\"a}{\\"a}nniemi, Tuomas and Karras, Tero and Laine, Samuli and Lehtinen, Jaakko and Aila, Timo',
        "Improved Precision and Recall Metric for Assessing Generative Models",
        _NEURIPS,
        2019,
        "1904.06991",
    ),
    "lee2024improving": (
        "inproceedings",
        "Lee, Sangyun and Lin, Zinan and Fanti, Giulia",
        "Improving the Training of Rectified Flows",
        _NEURIPS,
        2024,
        "2405.20320",
    ),
    "lipman2023flow": (
        "inproceedings",
        "Lipman, Yaron and Chen, Ricky T. Q. and Ben-Hamu, Heli and Nickel, Maximilian and Le, Matthew",
        "Flow Matching for Generative Modeling",
        _ICLR,
        2023,
        "2210.02747",
    ),
    "liu2023flow": (
        "inproceedings",
        "Liu, Xingchao and Gong, Chengyue and Liu, Qiang",
        "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow",
        _ICLR,
        2023,
        "2209.03003",
    ),
    "liu2024instaflow": (
        "inproceedings",
        "Liu, Xingchao and Zhang, Xiwen and Ma, Jianzhu and Peng, Jian and Liu, Qiang",
        "{I}nsta{F}low: One Step is Enough for High-Quality Diffusion-Based Text-to-Image Generation",
        _ICLR,
        2024,
        "2309.06380",
    ),
    "lu2022dpm": (
        "misc",
        "Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and Zhu, Jun",
        "{DPM}-{S}olver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
        "",
        2022,
        "2211.01095",
    ),
    "lu2025simplifying": (
        "inproceedings",
        "Lu, Cheng and Song, Yang",
        "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
        _ICLR,
        2025,
        "2410.11081",
    ),
    "naeem2020reliable": (
        "inproceedings",
        "Naeem, Muhammad Ferjad and Oh, Seong Joon and Uh, Youngjung and Choi, Yunjey and Yoo, Jaejun",
        "Reliable Fidelity and Diversity Metrics for Generative Models",
        _ICML,
        2020,
        "2002.09797",
    ),
    "peebles2023scalable": (
        "inproceedings",
        "Peebles, William and Xie, Saining",
        "Scalable Diffusion Models with Transformers",
        "IEEE/CVF International Conference on Computer Vision",
        2023,
        "2212.09748",
    ),
    "peng2025flow": (
        "misc",
        "Peng, Yansong and Zhu, Kai and Liu, Yu and Wu, Pingyu and Li, Hebei and Sun, Xiaoyan and Wu, Feng",
        "Flow-Anchored Consistency Models",
        "",
        2025,
        "2507.03738",
    ),
    "pooladian2023multisample": (
        "inproceedings",
        "Pooladian, Aram-Alexandre and Ben-Hamu, Heli and Domingo-Enrich, Carles and Amos, Brandon and "
        "Lipman, Yaron and Chen, Ricky T. Q.",
        "Multisample Flow Matching: Straightening Flows with Minibatch Couplings",
        _ICML,
        2023,
        "2304.14772",
    ),
    "salimans2022progressive": (
        "inproceedings",
        "Salimans, Tim and Ho, Jonathan",
        "Progressive Distillation for Fast Sampling of Diffusion Models",
        _ICLR,
        2022,
        "2202.00512",
    ),
    "song2021denoising": (
        "inproceedings",
        "Song, Jiaming and Meng, Chenlin and Ermon, Stefano",
        "Denoising Diffusion Implicit Models",
        _ICLR,
        2021,
        "2010.02502",
    ),
    "song2023consistency": (
        "inproceedings",
        "Song, Yang and Dhariwal, Prafulla and Chen, Mark and Sutskever, Ilya",
        "Consistency Models",
        _ICML,
        2023,
        "2303.01469",
    ),
    "szekely2013energy": (
        "article",
        "Sz{\\'e}kely, G{\\'a}bor J. and Rizzo, Maria L.",
        "Energy statistics: A class of statistics based on distances",
        "Journal of Statistical Planning and Inference, 143(8), 1249--1272",
        2013,
        None,
    ),
    "tong2024improving": (
        "article",
        "Tong, Alexander and Fatras, Kilian and Malkin, Nikolay and Huguet, Guillaume and Zhang, Yanlei and "
        "Rector-Brooks, Jarrid and Wolf, Guy and Bengio, Yoshua",
        "Improving and generalizing flow-based generative models with minibatch optimal transport",
        "Transactions on Machine Learning Research",
        2024,
        "2302.00482",
    ),
    "yan2024perflow": (
        "inproceedings",
        "Yan, Hanshu and Liu, Xingchao and Pan, Jiachun and Liew, Jun Hao and Liu, Qiang and Feng, Jiashi",
        "{P}e{RF}low: Piecewise Rectified Flow as Universal Plug-and-Play Accelerator",
        _NEURIPS,
        2024,
        "2405.07510",
    ),
    "yang2024consistency": (
        "misc",
        "Yang, Ling and Zhang, Zixiang and Zhang, Zhilong and Liu, Xingchao and Xu, Minkai and Zhang, "
        "Wentao and Meng, Chenlin and Ermon, Stefano and Cui, Bin",
        "Consistency Flow Matching: Defining Straight Flows with Velocity Consistency",
        "",
        2024,
        "2407.02398",
    ),
    "yin2024one": (
        "inproceedings",
        'Yin, Tianwei and Gharbi, Micha{\\"e}l and Zhang, Richard and Shechtman, Eli and Durand, '
        "Fr{\\'e}do and Freeman, William T. and Park, Taesung",
        "One-step Diffusion with Distribution Matching Distillation",
        "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
        2024,
        "2311.18828",
    ),
    "zhang2018unreasonable": (
        "inproceedings",
        "Zhang, Richard and Isola, Phillip and Efros, Alexei A. and Shechtman, Eli and Wang, Oliver",
        "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
        "IEEE Conference on Computer Vision and Pattern Recognition",
        2018,
        "1801.03924",
    ),
    "zhang2023fast": (
        "inproceedings",
        "Zhang, Qinsheng and Chen, Yongxin",
        "Fast Sampling of Diffusion Models with Exponential Integrator",
        _ICLR,
        2023,
        "2204.13902",
    ),
    "zhao2023unipc": (
        "inproceedings",
        "Zhao, Wenliang and Bai, Lujia and Rao, Yongming and Zhou, Jie and Lu, Jiwen",
        "{U}ni{PC}: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models",
        _NEURIPS,
        2023,
        "2302.04867",
    ),
    "zhou2024score": (
        "inproceedings",
        "Zhou, Mingyuan and Zheng, Huangjie and Wang, Zhendong and Yin, Mingzhang and Huang, Hai",
        "Score identity {D}istillation: Exponentially Fast Distillation of Pretrained Diffusion Models "
        "for One-Step Generation",
        _ICML,
        2024,
        "2404.04057",
    ),
    "zhu2024slimflow": (
        "inproceedings",
        "Zhu, Yuanzhi and Liu, Xingchao and Liu, Qiang",
        "{S}lim{F}low: Training Smaller One-Step Diffusion Models with Rectified Flow",
        "European Conference on Computer Vision",
        2024,
        "2407.12718",
    ),
}


def bibtex(keys: Iterable[str]) -> str:
    """BibTeX of the given keys, each once and in the order given.

    >>> print(bibtex(["liu2023flow"]).splitlines()[0])
    @inproceedings{liu2023flow,

    Raises:
        UserError: a key is unknown.
    """
    return "\n\n".join(_entry(key) for key in dict.fromkeys(keys))


def _entry(key: str) -> str:
    kind, authors, title, where, year, arxiv = _find(key)
    fields = {"title": title, "author": authors}
    if kind == "inproceedings":
        fields["booktitle"] = where
    elif kind == "article":
        journal, *numbers = where.split(", ")
        fields["journal"] = journal
        if numbers:
            volume, _, number = numbers[0].rstrip(")").partition("(")
            fields |= {"volume": volume, "number": number, "pages": numbers[1]}
    fields["year"] = str(year)
    if arxiv is not None:
        fields |= {"eprint": arxiv, "archiveprefix": "arXiv"}
    lines = [f"  {name} = {{{value}}}" for name, value in fields.items()]
    return f"@{kind}{{{key},\n" + ",\n".join(lines) + "\n}"


def short_reference(key: str) -> str:
    """One line: first author and others, title, year, arXiv number.

    >>> short_reference("ho2022classifier")
    'Ho and Salimans, Classifier-Free Diffusion Guidance, 2022, arXiv:2207.12598'
    """
    _, authors, title, _, year, arxiv = _find(key)
    names = [author.split(",")[0] for author in authors.split(" and ")]
    who = " and ".join(names) if len(names) <= 2 else f"{names[0]} et al."
    line = f"{who}, {title}, {year}" + (f", arXiv:{arxiv}" if arxiv else "")
    for tex, letter in (("{\\'e}", "é"), ("{\\'a}", "á"), ('{\\"a}', "ä"), ('{\\"e}', "ë"), ('{\\"u}', "ü")):
        line = line.replace(tex, letter)
    return line.replace("{", "").replace("}", "").replace("--", "–")


def _find(key: str) -> Entry:
    if key not in CITATIONS:
        raise unknown("citation", key, CITATIONS)
    return CITATIONS[key]
