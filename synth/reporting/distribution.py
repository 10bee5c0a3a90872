"""How near a sample of instructions is to another one that stands for the truth: figures that are 0 (or an AUC of 0.5) where both are
draws of one distribution, and that grow as one is narrower, cleaner or thinned out.

- AUC of a classifier that is to tell the two apart (C2ST: Lopez-Paz and Oquab, arXiv 1610.06545), on characters of the text;
- MMD² with a Gaussian kernel (Gretton et al., JMLR 13, 2012, equation 3: the unbiased estimate) on vectors of the text;
- how far the log-probabilities per token are apart (two-sample Kolmogorov-Smirnov distance), and what texts cost in nats on the mean;
- total variation between shares of topics;
- how many texts occur more than once.

A text that occurs often is a part of the distribution, so nothing here removes duplicates. The classifier's folds are drawn by item, not
by text: each item is a draw of its own, and how often a text was drawn on either side is just what is to be compared. On the miniature
model, folds grouped by text rank samples alike (de-duplicated .551 against .552), and two draws of one distribution give .50 either way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import vstack
from scipy.stats import ks_2samp
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import pairwise_distances, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import normalize

CHARACTERS = 2000  # of a text that are compared: the rest of a long one changes its features little
FOLDS, REPEATS = 5, 3  # of the classifier's cross-validation; repeats average the luck of the folds out
BOOTSTRAPS, PERMUTATIONS = 200, 499
DIMENSIONS = 50  # of the vectors that stand for texts where the base's own are not there
FEWEST = 2 * FOLDS  # texts on each side below which nothing is compared
WORDS, EXAMPLES = 5, 2  # that describe a topic


@dataclass
class Sample:
    """Texts in a random order, with what their model said of them: log-probability (NaN: unknown) and tokens."""

    texts: list[str]
    logprobs: np.ndarray
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def part(self, chosen: slice) -> Sample:
        return Sample(self.texts[chosen], self.logprobs[chosen], self.tokens[chosen])

    @property
    def nats(self) -> np.ndarray:
        """Of each text, per token."""
        return -self.logprobs / np.maximum(self.tokens, 1)


class Yardstick:
    """Compares samples with `fresh`. `others` are all that are to be compared: features are made for their texts once, so that figures of
    different samples can be set beside each other. `vectors` hold a vector for every text; without them, TF-IDF and SVD make some."""

    def __init__(self, fresh: Sample, others: Sequence[Sample], topics: int, vectors: Mapping[str, np.ndarray] | None = None,
                 seed: int = 0):
        self.fresh, self.seed = fresh, seed
        distinct = dict.fromkeys(text for sample in (fresh, *others) for text in sample.texts)
        self._row = {text: i for i, text in enumerate(distinct)}
        shown = [text[:CHARACTERS] for text in distinct]
        self._characters = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True, min_df=_few(shown)).fit_transform(shown)
        reduced = _reduced(self._characters, seed) if vectors is None else None
        self._vectors = reduced if vectors is None else np.stack([vectors[text] for text in distinct]).astype(np.float64)
        self.width = _median_distance(self._vectors[self._rows(fresh)])
        whole = [text for sample in (fresh, *others[:1]) for text in sample.texts]
        self.topics = Topics(shown, [self._row[text] for text in whole], topics, seed)

    def compare(self, sample: Sample) -> dict:
        """All figures of a sample beside those of `fresh`; only the number of texts where there are too few of them."""
        return self._compare(self.fresh, sample)

    def itself(self) -> dict:
        """What the figures are between the two halves of `fresh`, where nothing differs but by chance."""
        half = len(self.fresh) // 2
        return self._compare(self.fresh.part(slice(0, half)), self.fresh.part(slice(half, None)))

    def shares(self, sample: Sample) -> np.ndarray:
        """Of the topics."""
        return self.topics.shares(self._rows(sample))

    def _compare(self, fresh: Sample, sample: Sample) -> dict:
        found = {"texts": len(sample), "characters": _mean([len(text) for text in sample.texts]), "tokens": _mean(sample.tokens)}
        if min(len(fresh), len(sample)) < FEWEST:
            return found
        a, b = self._rows(fresh), self._rows(sample)
        auc, auc_error = classifier_auc(self._characters[a], self._characters[b], self.seed)
        squared, p, z = mmd(self._vectors[a], self._vectors[b], self.width, self.seed)
        found |= {"auc": auc, "auc_error": auc_error, "mmd2": squared, "mmd_p": p, "mmd_z": z}
        return found | self.topics.compare(a, b) | likelihoods(fresh, sample) | repeats(fresh.texts, sample.texts)

    def _rows(self, sample: Sample) -> np.ndarray:
        return np.array([self._row[text] for text in sample.texts], dtype=int)


def classifier_auc(a, b, seed: int) -> tuple[float, float]:
    """Area under the ROC curve of a logistic regression that tells rows of `a` from rows of `b`, each scored by a model that was not
    fitted on it; and its bootstrap standard error, over items. Strong regularisation (C 0.1): the differences are slight."""
    features, side = vstack([a, b]).tocsr(), np.r_[np.ones(a.shape[0]), np.zeros(b.shape[0])]
    scores = np.zeros(len(side))
    for repeat in range(REPEATS):
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=(seed + repeat) % 2**32)
        for rest, held_out in folds.split(features, side):
            model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=500).fit(features[rest], side[rest])
            scores[held_out] += model.decision_function(features[held_out])
    random = np.random.default_rng(seed)
    firsts, seconds = np.flatnonzero(side), np.flatnonzero(side == 0)
    resampled = [np.r_[random.choice(firsts, len(firsts)), random.choice(seconds, len(seconds))] for _ in range(BOOTSTRAPS)]
    error = np.std([roc_auc_score(side[rows], scores[rows]) for rows in resampled], ddof=1)
    return float(roc_auc_score(side, scores)), float(error)


def mmd(a: np.ndarray, b: np.ndarray, width: float, seed: int) -> tuple[float, float, float]:
    """Unbiased squared maximum mean discrepancy of two sets of vectors under exp(-d² / (2 width²)); the share of random divisions of both
    sets together that are as far apart (p), and how many of their standard deviations this one is from their mean (z)."""
    joined = np.concatenate([a, b])
    kernel = np.exp(pairwise_distances(joined, metric="sqeuclidean") / (-2 * width**2)).astype(np.float32)
    np.fill_diagonal(kernel, 0)
    side = np.r_[np.ones(len(a), np.float32), np.zeros(len(b), np.float32)]
    random = np.random.default_rng(seed)
    sides = np.stack([side, *(random.permutation(side) for _ in range(PERMUTATIONS))], axis=1)
    to_a = kernel @ sides  # of each vector to all on the first side, in every division
    within_a, of_a = (sides * to_a).sum(0, dtype=np.float64), kernel.sum(1, dtype=np.float64) @ sides
    between, within_b = of_a - within_a, kernel.sum(dtype=np.float64) - 2 * of_a + within_a
    n, m = len(a), len(b)
    squared = within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * between / (n * m)
    found, chance = squared[0], squared[1:]
    # rounding makes equal divisions differ in the last digits
    p = (1 + np.sum(chance >= found - 1e-9)) / (1 + PERMUTATIONS)
    return float(found), float(p), float((found - chance.mean()) / max(chance.std(), 1e-12))


def likelihoods(fresh: Sample, sample: Sample) -> dict:
    """Kolmogorov-Smirnov distance of nats per token and the difference of their means; and nats of a whole text, which on the mean over
    `fresh` are the distribution's entropy. Empty where a server did not tell."""
    a, b = (side.nats[np.isfinite(side.nats)] for side in (fresh, sample))
    if min(len(a), len(b)) < FEWEST:
        return {}
    test = ks_2samp(a, b, method="asymp")
    whole_a, whole_b = (-side.logprobs[np.isfinite(side.logprobs)] for side in (fresh, sample))
    return {"ks": float(test.statistic), "ks_p": float(test.pvalue), "nats": _mean(b), "nats_difference": _mean(b) - _mean(a),
            "nats_error": math.sqrt(a.var() / len(a) + b.var() / len(b)), "nats_text": _mean(whole_b),
            "nats_text_difference": _mean(whole_b) - _mean(whole_a),
            "nats_text_error": math.sqrt(whole_a.var() / len(whole_a) + whole_b.var() / len(whole_b))}


def repeats(fresh: Sequence[str], texts: Sequence[str]) -> dict:
    """Share of texts that stand more than once among as many of each sample: the share grows with the number."""
    n = min(len(fresh), len(texts))
    a, b = (_repeated(side[:n]) for side in (fresh, texts))
    return {"repeated": b, "repeated_fresh": a, "repeated_error": math.sqrt((a * (1 - a) + b * (1 - b)) / n)}


def _repeated(texts: Sequence[str]) -> float:
    return sum(count for count in Counter(texts).values() if count > 1) / len(texts)


class Topics:
    """Groups of texts by their words: k-means on TF-IDF and SVD, largest in the texts it was fitted on first."""

    def __init__(self, texts: Sequence[str], fitted: Sequence[int], count: int, seed: int):
        """Fitted on the texts of the given numbers, a text as often as its number stands there."""
        # \w alone takes words of one letter and digits too
        vectorizer = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", sublinear_tf=True, min_df=_few(texts), max_features=20_000)
        self._features = vectorizer.fit_transform(texts)
        self._names = vectorizer.get_feature_names_out()
        vectors = _reduced(self._features, seed)
        count = min(count, len(np.unique(vectors[fitted].round(9), axis=0)))
        groups = KMeans(count, n_init=4, random_state=seed % 2**32).fit(vectors[fitted])
        order = np.argsort(-np.bincount(groups.labels_, minlength=count), kind="stable")
        self.count, self.of = count, np.argsort(order)[groups.predict(vectors)]  # of: the topic of every text
        self._distances = groups.transform(vectors)[:, order]
        self._texts = texts

    def shares(self, rows: np.ndarray) -> np.ndarray:
        return np.bincount(self.of[rows], minlength=self.count) / max(len(rows), 1)

    def compare(self, a: np.ndarray, b: np.ndarray) -> dict:
        """Total variation between topic shares, and what chance alone makes of it on the mean: half the sum of normal absolute errors."""
        p, q = self.shares(a), self.shares(b)
        together = self.shares(np.r_[a, b])
        spread = np.sqrt(together * (1 - together) * (1 / len(a) + 1 / len(b)))
        return {"topics": float(np.abs(p - q).sum() / 2), "topics_chance": float(math.sqrt(2 / math.pi) * spread.sum() / 2)}

    def described(self) -> list[dict]:
        """Of each topic the words that set it off most from all texts, and the texts in its midst."""
        everywhere = np.asarray(self._features.mean(0)).ravel()
        found = []
        for topic in range(self.count):
            rows = np.flatnonzero(self.of == topic)
            gain = np.asarray(self._features[rows].mean(0)).ravel() - everywhere if len(rows) else np.zeros(len(everywhere))
            words = [str(self._names[i]) for i in np.argsort(-gain, kind="stable")[:WORDS] if gain[i] > 0]
            nearest = rows[np.argsort(self._distances[rows, topic], kind="stable")[:EXAMPLES]]
            found.append({"words": words, "examples": [self._texts[i] for i in nearest]})
        return found


def _reduced(features, seed: int) -> np.ndarray:
    """Rows of length 1 in few dimensions."""
    dimensions = min(DIMENSIONS, features.shape[1] - 1, features.shape[0] - 1)
    if dimensions < 2:
        return features.toarray()
    return normalize(TruncatedSVD(dimensions, random_state=seed % 2**32).fit_transform(features))


def _median_distance(vectors: np.ndarray, most: int = 1000) -> float:
    """Between two of the first vectors: the usual width of a Gaussian kernel."""
    distances = pairwise_distances(vectors[:most])[np.triu_indices(min(len(vectors), most), 1)]
    return float(np.median(distances)) or 1.0 if len(distances) else 1.0


def _few(texts: Sequence[str]) -> int:
    """What stands in a single text says nothing of others, as long as there are more than a handful."""
    return 2 if len(texts) >= 50 else 1


def _mean(values) -> float | None:
    return float(np.mean(values)) if len(values) else None
