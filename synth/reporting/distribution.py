"""Compare the distributions of two samples of instructions.

Each figure is 0 (an AUC 0.5) where both samples are draws of one distribution, up to chance, and grows as one is narrower or filtered:

- AUC of a classifier that separates the two by the characters of the text (C2ST: Lopez-Paz and Oquab, arXiv 1610.06545);
- MMD² with a Gaussian kernel on vectors of the text (Gretton et al., JMLR 13, 2012, equation 3: the unbiased estimate);
- two-sample Kolmogorov-Smirnov distance of the negative log-probabilities per token, and the difference of their means, in nats;
- total variation between the shares of topics;
- the share of texts that occur more than once.

Frequent texts are part of a distribution, so nothing here removes duplicates. For the same reason the classifier's folds are drawn by item
and not by text: each item is a draw of its own.
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

MAX_CHARACTERS = 2000  # of a text that are compared: the rest of a long one changes its features little
FOLDS, REPEATS = 5, 3  # of the classifier's cross-validation; repeats average out the chance of the folds
BOOTSTRAPS, PERMUTATIONS = 200, 499
BLOCK = 256  # vectors whose similarities to all others are in memory at a time
DIMENSIONS = 50  # of the vectors of texts where there are no embeddings of the base
MIN_TEXTS = 2 * FOLDS  # of each sample; with fewer nothing is compared
TOPIC_WORDS, TOPIC_EXAMPLES = 5, 2  # that describe a topic


@dataclass
class InstructionSample:
    """Instructions in a random order."""

    texts: list[str]
    logprobs: np.ndarray  # of each text under the base; NaN: unknown
    tokens: np.ndarray  # number of each text

    def __len__(self) -> int:
        return len(self.texts)

    def part(self, rows: slice) -> InstructionSample:
        return InstructionSample(self.texts[rows], self.logprobs[rows], self.tokens[rows])

    @property
    def nats(self) -> np.ndarray:
        """Return the negative log-probability of each text, per token."""
        return -self.logprobs / np.maximum(self.tokens, 1)


class ReferenceComparison:
    """Compare samples with a reference sample."""

    def __init__(self, reference: InstructionSample, others: Sequence[InstructionSample], topics: int,
                 vectors: Mapping[str, np.ndarray] | None = None, seed: int = 0):
        """Build the features of all texts.

        `others` are all samples that will be compared: they share their features, so that their figures can be compared with each other.
        `vectors` holds a vector of every text; without them, vectors are made by TF-IDF and SVD.
        """
        self.reference, self.seed = reference, seed
        distinct = dict.fromkeys(text for sample in (reference, *others) for text in sample.texts)
        self._row = {text: i for i, text in enumerate(distinct)}
        shortened = [text[:MAX_CHARACTERS] for text in distinct]
        vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True, min_df=_min_document_count(shortened))
        self._characters = vectorizer.fit_transform(shortened)
        if vectors is None:
            self._vectors = _reduce_dimensions(self._characters, seed)
        else:
            self._vectors = np.stack([vectors[text] for text in distinct]).astype(np.float64)
        self._kernel_width = _median_distance(self._vectors[self._rows(reference)])
        fitted_texts = [text for sample in (reference, *others[:1]) for text in sample.texts]
        self.topics = Topics(shortened, [self._row[text] for text in fitted_texts], topics, seed)

    def compare(self, sample: InstructionSample) -> dict:
        """Return all figures of a sample against the reference.

        Where either has too few texts, these are only the sample's size and lengths.
        """
        return self._compare(self.reference, sample)

    def baseline(self) -> dict:
        """Return the figures between the two halves of the reference, which differ only by chance."""
        half = len(self.reference) // 2
        return self._compare(self.reference.part(slice(0, half)), self.reference.part(slice(half, None)))

    def topic_shares(self, sample: InstructionSample) -> np.ndarray:
        """Return each topic's share of a sample."""
        return self.topics.shares(self._rows(sample))

    def _compare(self, reference: InstructionSample, sample: InstructionSample) -> dict:
        figures = {"texts": len(sample), "characters": _mean([len(text) for text in sample.texts]), "tokens": _mean(sample.tokens)}
        if min(len(reference), len(sample)) < MIN_TEXTS:
            return figures
        a, b = self._rows(reference), self._rows(sample)
        auc, auc_error = classifier_auc(self._characters[a], self._characters[b], self.seed)
        mmd2, p, z = squared_mmd(self._vectors[a], self._vectors[b], self._kernel_width, self.seed)
        figures |= {"auc": auc, "auc_error": auc_error, "mmd2": mmd2, "mmd_p": p, "mmd_z": z}
        figures |= self.topics.compare(a, b)
        figures |= compare_likelihoods(reference, sample)
        return figures | compare_repeats(reference.texts, sample.texts)

    def _rows(self, sample: InstructionSample) -> np.ndarray:
        return np.array([self._row[text] for text in sample.texts], dtype=int)


def classifier_auc(a, b, seed: int) -> tuple[float, float]:
    """Return the AUC of a classifier that separates rows of `a` from rows of `b`, and its standard error.

    The classifier is a cross-validated logistic regression, strongly regularised (C 0.1) because the differences are slight. The error is
    a bootstrap over items.
    """
    features, side = vstack([a, b]).tocsr(), np.r_[np.ones(a.shape[0]), np.zeros(b.shape[0])]
    scores = np.zeros(len(side))
    for repeat in range(REPEATS):
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=(seed + repeat) % 2**32)
        for train, test in folds.split(features, side):
            model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=500).fit(features[train], side[train])
            scores[test] += model.decision_function(features[test])
    random = np.random.default_rng(seed)
    firsts, seconds = np.flatnonzero(side), np.flatnonzero(side == 0)
    resampled = [np.r_[random.choice(firsts, len(firsts)), random.choice(seconds, len(seconds))] for _ in range(BOOTSTRAPS)]
    error = np.std([roc_auc_score(side[rows], scores[rows]) for rows in resampled], ddof=1)
    return float(roc_auc_score(side, scores)), float(error)


def squared_mmd(a: np.ndarray, b: np.ndarray, width: float, seed: int) -> tuple[float, float, float]:
    """Return the squared maximum mean discrepancy (MMD²) of two sets of vectors, with p and z.

    It is the unbiased estimate under the kernel exp(-d² / (2 width²)). p and z come from a permutation test: p is the share of random
    divisions of the vectors that are as far apart, z the distance from their mean in their standard deviations.
    """
    joined = np.concatenate([a, b])
    side = np.r_[np.ones(len(a), np.float32), np.zeros(len(b), np.float32)]
    random = np.random.default_rng(seed)
    sides = np.stack([side, *(random.permutation(side) for _ in range(PERMUTATIONS))], axis=1)
    within_a, similarity = np.zeros(sides.shape[1]), np.zeros(len(joined))  # the latter of each vector, to all others
    for start in range(0, len(joined), BLOCK):  # the whole kernel would be the largest object of a report
        rows = slice(start, start + BLOCK)
        kernel = np.exp(pairwise_distances(joined[rows], joined, metric="sqeuclidean") / (-2 * width**2)).astype(np.float32)
        kernel[np.arange(len(kernel)), np.arange(start, start + len(kernel))] = 0
        to_a = kernel @ sides  # similarity of these vectors to all on the first side, in every division
        within_a += (sides[rows] * to_a).sum(0, dtype=np.float64)
        similarity[rows] = kernel.sum(1, dtype=np.float64)
    of_a = similarity @ sides
    between, within_b = of_a - within_a, similarity.sum() - 2 * of_a + within_a
    n, m = len(a), len(b)
    squared = within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * between / (n * m)
    observed, chance = squared[0], squared[1:]
    # rounding makes equal divisions differ in the last digits
    p = (1 + np.sum(chance >= observed - 1e-9)) / (1 + PERMUTATIONS)
    return float(observed), float(p), float((observed - chance.mean()) / max(chance.std(), 1e-12))


def compare_likelihoods(reference: InstructionSample, sample: InstructionSample) -> dict:
    """Compare the nats per token and per text; empty where log-probabilities are unknown.

    The mean nats per text of the reference are the entropy of its distribution.
    """
    a, b = (side.nats[np.isfinite(side.nats)] for side in (reference, sample))
    if min(len(a), len(b)) < MIN_TEXTS:
        return {}
    test = ks_2samp(a, b, method="asymp")
    per_text_a, per_text_b = (-side.logprobs[np.isfinite(side.logprobs)] for side in (reference, sample))
    return {"ks": float(test.statistic), "ks_p": float(test.pvalue), "nats": _mean(b), "nats_difference": _mean(b) - _mean(a),
            "nats_error": math.sqrt(a.var() / len(a) + b.var() / len(b)), "nats_text": _mean(per_text_b),
            "nats_text_difference": _mean(per_text_b) - _mean(per_text_a),
            "nats_text_error": math.sqrt(per_text_a.var() / len(per_text_a) + per_text_b.var() / len(per_text_b))}


def compare_repeats(reference: Sequence[str], texts: Sequence[str]) -> dict:
    """Compare the shares of texts that occur more than once.

    Equally many texts are compared, because the share grows with their number.
    """
    n = min(len(reference), len(texts))
    a, b = (_repeated_share(side[:n]) for side in (reference, texts))
    return {"repeated": b, "repeated_reference": a, "repeated_error": math.sqrt((a * (1 - a) + b * (1 - b)) / n)}


def _repeated_share(texts: Sequence[str]) -> float:
    return sum(count for count in Counter(texts).values() if count > 1) / len(texts)


class Topics:
    """Topics of texts: k-means on TF-IDF and SVD of their words, the largest topic first."""

    def __init__(self, texts: Sequence[str], fitted: Sequence[int], count: int, seed: int):
        """Fit at most `count` topics, and assign every text to one.

        They are fitted to the texts with the indices `fitted`, which may repeat.
        """
        # \w+ also takes digits and words of one letter
        vectorizer = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", sublinear_tf=True, min_df=_min_document_count(texts),
                                     max_features=20_000)
        self._features = vectorizer.fit_transform(texts)
        self._names = vectorizer.get_feature_names_out()
        vectors = _reduce_dimensions(self._features, seed)
        count = min(count, len(np.unique(vectors[fitted].round(9), axis=0)))
        groups = KMeans(count, n_init=4, random_state=seed % 2**32).fit(vectors[fitted])
        order = np.argsort(-np.bincount(groups.labels_, minlength=count), kind="stable")
        self.count, self.topic_of = count, np.argsort(order)[groups.predict(vectors)]
        self._distances = groups.transform(vectors)[:, order]
        self._texts = texts

    def shares(self, rows: np.ndarray) -> np.ndarray:
        """Return each topic's share of the texts with the indices `rows`."""
        return np.bincount(self.topic_of[rows], minlength=self.count) / max(len(rows), 1)

    def compare(self, a: np.ndarray, b: np.ndarray) -> dict:
        """Return the total variation between the topic shares of two samples, and its mean under chance.

        The latter is half the sum of the mean absolute errors of normal shares.
        """
        p, q = self.shares(a), self.shares(b)
        together = self.shares(np.r_[a, b])
        spread = np.sqrt(together * (1 - together) * (1 / len(a) + 1 / len(b)))
        return {"topics": float(np.abs(p - q).sum() / 2), "topics_chance": float(math.sqrt(2 / math.pi) * spread.sum() / 2)}

    def describe(self) -> list[dict]:
        """Return the most characteristic words of each topic and the texts nearest to its centre."""
        everywhere = np.asarray(self._features.mean(0)).ravel()
        descriptions = []
        for topic in range(self.count):
            rows = np.flatnonzero(self.topic_of == topic)
            gain = np.asarray(self._features[rows].mean(0)).ravel() - everywhere if len(rows) else np.zeros(len(everywhere))
            words = [str(self._names[i]) for i in np.argsort(-gain, kind="stable")[:TOPIC_WORDS] if gain[i] > 0]
            nearest = rows[np.argsort(self._distances[rows, topic], kind="stable")[:TOPIC_EXAMPLES]]
            descriptions.append({"words": words, "examples": [self._texts[i] for i in nearest]})
        return descriptions


def _reduce_dimensions(features, seed: int) -> np.ndarray:
    """Project rows to at most DIMENSIONS by SVD, and normalise them to length 1."""
    dimensions = min(DIMENSIONS, features.shape[1] - 1, features.shape[0] - 1)
    if dimensions < 2:
        return features.toarray()
    return normalize(TruncatedSVD(dimensions, random_state=seed % 2**32).fit_transform(features))


def _median_distance(vectors: np.ndarray, most: int = 1000) -> float:
    """Return the median distance between two of the first vectors, the usual width of a Gaussian kernel."""
    distances = pairwise_distances(vectors[:most])[np.triu_indices(min(len(vectors), most), 1)]
    return float(np.median(distances)) or 1.0 if len(distances) else 1.0


def _min_document_count(texts: Sequence[str]) -> int:
    """Return in how many texts a feature must occur: features of a single text say nothing about others."""
    return 2 if len(texts) >= 50 else 1


def _mean(values) -> float | None:
    return float(np.mean(values)) if len(values) else None
