"""The words of the sample corpus: fields of law, and the sentences that acts are made of.

The grammar is a compromise:

* A tiny model must learn it within a minute, so there are few sentences and few fillers per slot. A
  trained model's perplexity has one digit, an untrained one's is the vocabulary's size.
* Different acts must not look like duplicates, so nearly every sentence names what the act is
  about, and no two acts are about the same thing.
* A summary must follow from the act and, as far as it can, from its title. So duties belong to
  activities, framework acts to areas, and entry into force to the kind of act.

Nothing here is copied from a real act; names of persons, firms and places are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Area:
    """A field of law: its subject matters, who is bound, who supervises, what is regulated."""

    subjects: tuple[str, ...]
    code: str  # of the directory of legislation
    actors: str
    authority: str
    adjectives: tuple[str, ...]
    objects: tuple[str, ...]


AREAS = (
    Area(
        ("Data protection", "Information and verification"), "16.20", "controllers",
        "the supervisory authority",
        ("biometric", "medical", "genetic", "financial", "location", "genealogical"),
        ("records", "profiles", "identifiers", "registers", "files", "archives"),
    ),
    Area(
        ("Consumer protection",), "15.20", "traders", "the consumer authority",
        ("prepaid", "bundled", "discounted", "guaranteed", "refurbished", "personalised"),
        ("subscriptions", "vouchers", "household goods", "toys", "repair services", "offers"),
    ),
    Area(
        ("Environment",), "15.10", "operators", "the environment agency",
        ("recycled", "hazardous", "biodegradable", "organic", "untreated", "composite"),
        ("packaging", "solvents", "waste water", "sludge", "batteries", "emissions"),
    ),
    Area(
        ("Digital single market", "Information society"), "13.20", "providers",
        "the digital services board",
        ("encrypted", "automated", "interoperable", "hosted", "certified", "open"),
        ("platforms", "interfaces", "signatures", "ranking systems", "devices", "networks"),
    ),
    Area(
        ("Financial services", "Free movement of capital"), "10.40", "undertakings",
        "the financial supervisor",
        ("secured", "deferred", "collective", "revolving", "tradable", "retail"),
        ("credit agreements", "deposits", "insurance contracts", "funds", "payments", "bonds"),
    ),
    Area(
        ("Public health",), "15.30", "manufacturers", "the medicines agency",
        ("sterile", "paediatric", "diagnostic", "implantable", "compounded", "reusable"),
        ("medicines", "instruments", "blood products", "vaccines", "implants", "test kits"),
    ),
    Area(
        ("Employment", "Social provisions"), "05.20", "employers", "the labour inspectorate",
        ("temporary", "part-time", "remote", "posted", "nocturnal", "apprenticed"),
        ("workers", "crews", "contracts of employment", "shifts", "work places", "trainees"),
    ),
    Area(
        ("Transport",), "07.20", "carriers", "the transport authority",
        ("articulated", "electric", "refrigerated", "unaccompanied", "scheduled", "oversized"),
        ("vehicles", "vessels", "freight services", "containers", "trailers", "passenger services"),
    ),
    Area(
        ("Agriculture", "Foodstuffs"), "03.60", "producers", "the paying agency",
        ("fortified", "dried", "raw", "fermented", "frozen", "smoked"),
        ("milk products", "cereals", "fruit juices", "olive oils", "eggs", "honeys"),
    ),
    Area(
        ("Competition", "Commercial policy"), "08.10", "exporters", "the competition authority",
        ("subsidised", "rolled", "forged", "woven", "laminated", "galvanised"),
        ("steel tubes", "fabrics", "glass fibres", "fasteners", "cables", "tiles"),
    ),
)  # fmt: skip

ORIGINS = ("imported", "domestic", "cross-border", "second-hand", "seasonal", "industrial")

# What an act is on, and the duty that follows from it.
DUTIES = {
    "labelling": "label {term} in a clear and legible manner",
    "registration": "enter {term} in the public register before first use",
    "monitoring": "monitor {term} at regular intervals and keep the results",
    "transfer": "notify each transfer of {term} in advance",
    "certification": "obtain a certificate of conformity for {term}",
    "withdrawal": "withdraw {term} that do not conform without delay",
    "storage": "store {term} separately and securely",
    "reporting": "report on {term} once a year",
}

# Drawn anew at each use, unlike the facts of an act.
VARIED: Mapping[str, Sequence[str]] = {
    "days": ("10 days", "14 days", "30 days", "60 days"),
    "months": ("three months", "six months", "12 months", "18 months"),
    "years": ("two years", "three years", "five years", "10 years"),
    "share": ("5 %", "10 %", "15 %", "20 %", "25 %", "50 %"),
    "adverb": ("without delay", "in writing", "by electronic means", "in a common format"),
    "quality": ("reliable", "comparable", "complete", "accurate", "traceable"),
    "aim": (
        "legal certainty", "fair competition", "a high level of protection",
        "the free movement of goods and services", "public confidence", "effective supervision",
    ),
    "reason": (
        "divergent national rules", "technical progress", "the growth of trade",
        "serious incidents", "the lack of common standards", "recent scientific advice",
    ),
    "means": (
        "a documented procedure", "an internal audit", "a written declaration",
        "an independent assessment", "a sample taken at random", "a technical file",
    ),
}  # fmt: skip

RECITALS = (
    "The {activity} of {term} is essential for {aim}.",
    "Owing to {reason}, the conditions under which {term} are placed on the market differ.",
    "In order to ensure {aim}, common rules on {term} should be laid down.",
    "The {actors} responsible for {term} should be subject to supervision by {authority}.",
    "{Cite} already provides for certain requirements, but it does not cover {term}.",
    "The definitions of {cite} should apply to {term} unless this {kind} provides otherwise.",
    "Experience with {cite} has shown that {reason} may affect the {activity} of {term}.",
    "Small {actors} should not bear a disproportionate burden as regards {term}.",
    "Information on {term} should be {quality}, so that {authority} can rely on it.",
    "The committee set up by {cite} has delivered its opinion on the measures as regards {term}.",
    "A transitional period of {months} should allow {actors} to adapt their {term}.",
    "The objective of ensuring {aim} as regards {term} is better achieved at Union level.",
    "The {activity} of {term} should be carried out by means of {means}.",
    "In view of {reason}, the rules on {term} should be reviewed every {years}.",
)

DEFINITIONS = (
    "‘{actors}’ means natural or legal persons who are responsible for {term};",
    "‘{term}’ means {objects} that are {adjective} and intended for use in the Union;",
    "‘{activity}’ means any act by which {actors} carry out the {activity} of {term};",
    "‘serious incident’ means an event in which {term} endanger {aim};",
    "‘technical file’ means the documents by which the {activity} of {term} can be verified;",
    "‘placing on the market’ means the first making available of {term} in return for payment;",
)

# Title of an article -> its paragraphs.
ARTICLES: Mapping[str, Sequence[str]] = {
    "Obligations of {actors}": (
        "{Actors} shall {duty}.",
        "{Actors} shall ensure that information on {term} is {quality}.",
        "{Actors} shall keep the technical file of {term} for {years}.",
        "Where {term} do not conform, {actors} shall inform {authority} {adverb}.",
    ),
    "Conditions for the {activity} of {term}": (
        "The {activity} of {term} shall be subject to {means}.",
        "The conditions for the {activity} of {term} shall be fulfilled within {days}.",
        "No more than {share} of {term} may be exempted by {authority}.",
        "The requirements of {cite} shall apply to {term} by analogy.",
    ),
    "Competent authorities": (
        "{Authority} shall supervise the {activity} of {term}.",
        "{Authority} shall act within {days} of receiving a complaint about {term}.",
        "{Authority} may request {means} from {actors} as regards {term}.",
        "The powers as regards {term} shall be exercised in accordance with {cite}.",
    ),
    "Exchange of information": (
        "Member States shall exchange {quality} information on {term} {adverb}.",
        "{Authority} shall publish a list of {actors} and of their {term} every {months}.",
        "Information on {term} shall be kept for no longer than {years}.",
    ),
    "Inspections": (
        "{Authority} shall inspect at least {share} of {term} every {years}.",
        "Inspections of {term} shall be based on {means}.",
        "{Actors} shall give access to {term} within {days} of a request.",
    ),
    "Fees": (
        "{Authority} may charge a fee for the {activity} of {term}.",
        "The fee for {term} shall not exceed {share} of the cost of {means}.",
        "Small {actors} shall be exempted from the fee for {term} for {months}.",
    ),
    "Complaints": (
        "Any person may lodge a complaint about {term} with {authority} {adverb}.",
        "{Actors} shall answer complaints about {term} within {days}.",
    ),
    "Penalties": (
        "Member States shall lay down penalties for infringements of the rules on {term}.",
        "Fines for infringements as regards {term} shall not exceed {share} of the turnover.",
    ),
    "Reports and review": (
        "{Authority} shall report on the {activity} of {term} every {years}.",
        "The report shall assess whether {reason} affects {term}, and be {quality}.",
        "The Commission shall review the rules on {term} by means of {means} within {years}.",
    ),
    "Amendment of earlier acts": (
        "In {cite}, the words ‘{objects}’ are replaced by the words ‘{term}’.",
        "References in {cite} to {objects} shall be construed as references to {term}.",
    ),
}

LAST_ARTICLES = {
    "regulation": (
        "Entry into force",
        "This Regulation shall enter into force on the twentieth day following its publication.",
        "This Regulation shall be binding in its entirety as regards {term}.",
    ),
    "directive": (
        "Transposition",
        "Member States shall bring into force the provisions on {term} within two years.",
        "This Directive on {term} is addressed to the Member States.",
    ),
    "decision": (
        "Taking effect",
        "This Decision shall take effect on the day of its notification.",
        "This Decision is addressed to {actors} of {term}.",
    ),
}

ENTRY = {
    "regulation": "It enters into force on the twentieth day following its publication.",
    "directive": "Member States must transpose it within two years.",
    "decision": "It takes effect on the day of its notification.",
}
