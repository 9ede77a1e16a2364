//! Whole nodes, under every kind of fault.

use weft_sim::clusters;
use weft_sim::faults::Kind;

/// Each of these once broke a promise; what it found is mended.
const MENDED: [(u64, usize); 103] = [
    (40, 3),
    (275, 6),
    (365, 8),
    (378, 5),
    (436, 7),
    (580, 7),
    (693, 8),
    (704, 3),
    (715, 6),
    (832, 3),
    (1651, 6),
    (1716, 7),
    (1821, 8),
    (1855, 10),
    (2048, 3),
    (2915, 6),
    (10_455, 10),
    (10_688, 3),
    (10_977, 4),
    (11_077, 8),
    (20_123, 6),
    (20_169, 4),
    (20_232, 3),
    (20_392, 3),
    (20_817, 4),
    (20_830, 9),
    (20_831, 10),
    (20_910, 9),
    (21_013, 8),
    (21_032, 3),
    (21_554, 5),
    (22_712, 3),
    (22_909, 8),
    (25_347, 6),
    (26_487, 10),
    (29_050, 5),
    (29_071, 10),
    (29_588, 7),
    (30_170, 5),
    (30_216, 3),
    (31_210, 5),
    (33_343, 10),
    (34_408, 3),
    (36_104, 3),
    (40_126, 9),
    (50_340, 7),
    (50_976, 3),
    (51_004, 7),
    (51_385, 4),
    (51_429, 8),
    (51_774, 9),
    (51_920, 3),
    (62_214, 9),
    (100_669, 8),
    (101_288, 3),
    (102_280, 3),
    (140_042, 5),
    (141_290, 5),
    (144_543, 10),
    (144_776, 3),
    (306_529, 4),
    (401_184, 3),
    (402_491, 6),
    (600_684, 7),
    (601_354, 5),
    (608_877, 8),
    (608_986, 5),
    (646_123, 6),
    (1_004_572, 7),
    (1_004_679, 10),
    (1_007_778, 5),
    (1_020_927, 10),
    (1_024_629, 8),
    (1_026_264, 3),
    (1_031_120, 3),
    (1_038_596, 7),
    (1_106_332, 7),
    (1_107_458, 5),
    (1_109_772, 7),
    (1_110_762, 5),
    (1_215_041, 4),
    (1_216_431, 10),
    (1_221_693, 8),
    (1_223_820, 7),
    (1_224_582, 9),
    (1_230_648, 3),
    (1_236_570, 5),
    (1_250_914, 5),
    (1_266_960, 3),
    (1_281_660, 7),
    (1_291_307, 6),
    (1_299_923, 6),
    (1_325_556, 7),
    (1_329_450, 5),
    (1_330_248, 3),
    (1_424_027, 6),
    (1_506_800, 3),
    (1_507_899, 6),
    (1_508_000, 3),
    (1_511_906, 5),
    (1_518_053, 8),
    (1_528_528, 3),
    (1_600_945, 4),
];

/// The same, of worlds in which chains of the roster were forked and who forked them was removed.
const FORKED: [(u64, usize); 17] = [
    (22, 9),
    (29, 8),
    (30, 9),
    (36, 7),
    (67, 6),
    (108, 7),
    (124, 7),
    (135, 10),
    (150, 9),
    (186, 5),
    (546, 5),
    (911, 10),
    (1068, 7),
    (1282, 5),
    (1327, 10),
    (2432, 3),
    (4609, 4),
];

/// What happens in those.
const FORKING: [Kind; 10] = [
    Kind::Fork,
    Kind::Remove,
    Kind::Evict,
    Kind::Wipe,
    Kind::Partition,
    Kind::Crash,
    Kind::Restore,
    Kind::Clone,
    Kind::Late,
    Kind::Leave,
];

/// One in which a branch was forked again.
const FORKED_AGAIN: ([Kind; 6], (u64, usize)) = (
    [
        Kind::Fork,
        Kind::Weather,
        Kind::Partition,
        Kind::Crash,
        Kind::Late,
        Kind::Remove,
    ],
    (297, 4),
);

/// Worlds found by the gate's fresh seeds, which leave out these kinds.
const FRESH: [(u64, usize); 3] = [
    (60_838_467_537_198, 9),
    (138_039_057_512_141, 8),
    (280_133_169_948_285, 8),
];
const STRANGE: [Kind; 4] = [Kind::Restore, Kind::Clone, Kind::Liar, Kind::Fork];

fn seeds(range: std::ops::Range<u64>) {
    all(range.map(|seed| (seed, 3 + seed as usize % 8)));
}

fn all(worlds: impl IntoIterator<Item = (u64, usize)>) {
    with(&Kind::ALL, worlds);
}

fn with(kinds: &[Kind], worlds: impl IntoIterator<Item = (u64, usize)>) {
    let mut violations = Vec::new();
    for (seed, hosts) in worlds {
        let verdict = clusters::run(seed, hosts, kinds, false);
        let lines = verdict.violations.into_iter();
        violations.extend(lines.map(|line| format!("seed {seed}, {hosts} nodes: {line}")));
    }
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

// In parts, so that they run side by side.

#[test]
fn seeds_0_to_24_keep_every_promise() {
    seeds(0..25);
}

#[test]
fn seeds_25_to_49_keep_every_promise() {
    seeds(25..50);
}

#[test]
fn seeds_50_to_74_keep_every_promise() {
    seeds(50..75);
}

#[test]
fn seeds_75_to_99_keep_every_promise() {
    seeds(75..100);
}

#[test]
fn seeds_that_broke_a_promise_once_break_none() {
    all(MENDED);
    let ordinary: Vec<Kind> = Kind::ALL
        .into_iter()
        .filter(|kind| !STRANGE.contains(kind))
        .collect();
    with(&ordinary, FRESH);
}

#[test]
fn whoever_forked_a_chain_is_removed_and_all_agree() {
    with(&FORKING[..6], FORKED[..10].to_vec());
    with(&FORKING, FORKED);
    with(&FORKED_AGAIN.0, [FORKED_AGAIN.1]);
}

#[test]
fn equal_seeds_give_equal_traces_byte_for_byte() {
    let [once, again, other] = [5, 5, 6].map(|seed| clusters::run(seed, 4, &Kind::ALL, true));
    assert!(!once.trace.is_empty());
    assert!(once.trace == again.trace);
    assert_eq!(once.fingerprint, again.fingerprint);
    assert_ne!(once.fingerprint, other.fingerprint);
}
