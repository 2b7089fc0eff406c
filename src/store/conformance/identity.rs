//! Rules about identity: keys and consumers are compared byte by byte, and every value is kept so.

use bytes::Bytes;

use super::{Fixture, support::*};
use crate::{
    consumer::Consumer,
    fingerprint::Fingerprint,
    stored::record::{Attempt, Claim, RecordFilter},
};

/// Keys that differ in case, in spaces or in any single byte are different keys.
pub(super) async fn keys_are_compared_byte_by_byte(fixture: &dyn Fixture) {
    let keys = [
        "a", "A", "a ", " a", "a  ", "aa", "%", "_", "a%", "a_", "'", "\"", "\\", "a\\", "?", "$1", "0", "00",
    ];
    let claims: Vec<Claim> = keys.into_iter().map(claim_of).collect();
    each_is_its_own_record(fixture, &claims).await;
}

/// Consumers that differ in case, spaces, accents or normalization are different consumers. The
/// scopes that this crate makes are no names that others can have.
pub(super) async fn consumers_are_compared_byte_by_byte(fixture: &dyn Fixture) {
    let names = [
        "acme",
        "Acme",
        "ACME",
        "acme ",
        " acme",
        "acm\u{e9}",
        "acme\u{301}",
        "ß",
        "ss",
        "ſ",
        "s",
        "ı",
        "i",
        "I",
        "ﬁ",
        "fi",
        "日本",
        "日本 ",
        "\u{1f980}",
        "\u{1f98a}",
        "\t",
        "\n",
        "%",
        "'",
    ];
    let consumers =
        names.iter().map(|name| consumer(name)).chain([consumer("anonymous"), Consumer::anonymous()]);
    let claims: Vec<Claim> = consumers.map(|consumer| claim_by(consumer, "k")).collect();
    each_is_its_own_record(fixture, &claims).await;
}

/// The pair (consumer, key) is not a concatenation of the two.
pub(super) async fn consumer_and_key_are_kept_apart(fixture: &dyn Fixture) {
    let pairs = [
        ("a", "b:c"),
        ("a:b", "c"),
        ("ab", "c"),
        ("a", "bc"),
        ("a/b", "c"),
        ("a", "b/c"),
        ("a|b", "c"),
        ("a", "b|c"),
        ("a b", "c"),
        ("a", "b c"),
        ("c", "a"),
        ("a", "c"),
    ];
    let claims: Vec<Claim> = pairs.iter().map(|(name, key)| claim_by(consumer(name), key)).collect();
    each_is_its_own_record(fixture, &claims).await;
}

/// The longest consumers and keys are kept whole. Two that differ only in the last byte are
/// different.
pub(super) async fn the_longest_names_are_kept_whole(fixture: &dyn Fixture) {
    let long = "x".repeat(254);
    let wide = "\u{1f980}".repeat(63);
    let claims = [
        claim_by(consumer(&format!("{long}a")), &format!("{long}a")),
        claim_by(consumer(&format!("{long}a")), &format!("{long}b")),
        claim_by(consumer(&format!("{long}b")), &format!("{long}a")),
        claim_by(consumer(&format!("{wide}abc")), "k"),
        claim_by(consumer(&format!("{wide}abd")), "k"),
    ];
    each_is_its_own_record(fixture, &claims).await;
}

/// Fingerprints are bytes, not text. They have any bytes and any length, and are compared to the
/// last byte.
pub(super) async fn fingerprints_are_compared_byte_by_byte(fixture: &dyn Fixture) {
    let store = handle(fixture).await;
    let all_bytes: Vec<u8> = (0..=255).collect();
    let fingerprints: [Vec<u8>; 6] =
        [vec![0; 41], vec![], b"A".to_vec(), b"a ".to_vec(), vec![0xff, 0xfe, 0x00], all_bytes];
    for (n, bytes) in fingerprints.into_iter().enumerate() {
        let claim =
            Claim { fingerprint: Fingerprint::from_bytes(bytes.clone()), ..claim_of(&format!("key {n}")) };
        store.win(&claim, "a claim of an absent key").await;
        let record = store.get(&claim, "after the claim").await;
        assert_eq!(
            record.fingerprint,
            claim.fingerprint,
            "fingerprint of {} bytes as it was stored",
            bytes.len()
        );
    }

    let lapsing = |key: &str, bytes: &[u8]| {
        let fingerprint = Fingerprint::from_bytes(bytes.to_vec());
        Claim { fingerprint, lease: fixture.lease(), ..claim_of(key) }
    };
    let pairs: [(&str, &[u8], &[u8]); 4] =
        [("case", b"a", b"A"), ("space", b"a", b"a "), ("nul", b"a\0b", b"a\0c"), ("length", b"a", b"a\0")];
    for (key, bytes, _) in pairs {
        store.win(&lapsing(key, bytes), "first claim").await;
    }
    run_out(fixture).await;
    for (key, _, bytes) in pairs {
        store.be_refused(&lapsing(key, bytes), &format!("fingerprints differ in {key}")).await;
    }
}

/// A response is kept byte by byte: an empty one, one with every byte, and one of a mebibyte.
pub(super) async fn responses_are_kept_byte_by_byte(fixture: &dyn Fixture) {
    let [store, other] = two_handles(fixture).await;
    let all_bytes: Bytes = (0..=255).collect();
    let mebibyte: Bytes = (0..1 << 20).map(|n: u32| (n % 251).to_le_bytes()[0]).collect();
    for (key, body) in [("empty", Bytes::new()), ("all bytes", all_bytes), ("a mebibyte", mebibyte)] {
        let claim = claim_of(key);
        store.win_and_complete(&claim, body.clone()).await;
        let replayed = other.be_refused(&retry_of(&claim), "the record is completed").await;
        assert!(
            *response_of(&replayed) == body,
            "{key}: the response in a claim is not the one that was stored"
        );
        let found = other.get(&claim, "the record is completed").await;
        assert!(*response_of(&found) == body, "{key}: the response in get() is not the one that was stored");
    }
}

async fn each_is_its_own_record(fixture: &dyn Fixture, claims: &[Claim]) {
    let store = handle(fixture).await;
    for claim in claims {
        let Attempt { consumer, key, .. } = &claim.attempt;
        assert!(store.find(claim).await.is_none(), "({consumer:?}, {key:?}) was found before it was claimed");
        let won = store.win(claim, &format!("({consumer:?}, {key:?}) is a key of its own")).await;
        assert_eq!(won, (claim.record_id, 1), "id and number of a new record");
    }
    for claim in claims {
        let record = store.get(claim, "after all were claimed").await;
        assert_eq!(record.id, claim.record_id, "the record of ({:?}, {:?})", record.consumer, record.key);
        assert_eq!(record.consumer, claim.attempt.consumer, "the consumer as it was stored");
        assert_eq!(record.key, claim.attempt.key, "the key as it was stored");
    }
    let listed = store.list(RecordFilter::All, 1000).await.len();
    assert_eq!(listed, claims.len(), "number of records");
}

fn claim_by(consumer: Consumer, key: &str) -> Claim {
    let claim = claim_of(key);
    Claim { attempt: Attempt::new(consumer, claim.attempt.key.clone()), ..claim }
}
