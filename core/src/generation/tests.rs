use proptest::prelude::*;

use super::*;

fn other<'a>(name: &'a str, wanted: u32, minting: u32, loaded: &[u32], oldest: u32) -> Other<'a> {
    Other { name, keys: RegionKeys { wanted, minting, loaded: loaded.to_vec(), oldest }, heard: true }
}

fn member<'a>(name: &'a str, loaded: &'a [u32], oldest: u32) -> Member<'a> {
    Member { name, loaded, oldest: Some(oldest), registered: true }
}

fn snapshot<'a>(wanted: u32, minting: u32, members: Vec<Member<'a>>, others: Vec<Other<'a>>) -> Snapshot<'a> {
    Snapshot { wanted, minting, under_way: minting, settled: true, members, others }
}

fn words(held_up_by: &[HeldUp]) -> Vec<String> {
    held_up_by.iter().map(HeldUp::to_string).collect()
}

#[test]
fn a_generation_is_loaded_then_minted_with_then_alone() {
    // Told: loaded, not minted with.
    let told = plan(&snapshot(2, 1, vec![member("w-1", &[1], 1)], vec![other("osaka", 1, 1, &[1], 1)]));
    assert_eq!((told.oldest, told.newest, told.minting), (1, 2, 1));
    assert_eq!(
        words(&told.held_up_by),
        ["w-1: has not loaded generation 2", "osaka: was told to move to generation 1 only"]
    );
    // Here everybody has it, there somebody has not.
    let here = plan(&snapshot(2, 1, vec![member("w-1", &[1, 2], 1)], vec![other("osaka", 2, 1, &[1], 1)]));
    assert_eq!((here.minting, here.keys.loaded.as_slice()), (1, &[1, 2][..]));
    assert_eq!(words(&here.held_up_by), ["osaka: has not loaded generation 2"]);
    // Everybody everywhere.
    let loaded = plan(&snapshot(2, 1, vec![member("w-1", &[1, 2], 1)], vec![other("osaka", 2, 1, &[1, 2], 1)]));
    assert_eq!((loaded.oldest, loaded.minting), (1, 2));
    // Minted with here; an old one is in use there, then nowhere.
    let using = plan(&snapshot(2, 2, vec![member("w-1", &[1, 2], 2)], vec![other("osaka", 2, 2, &[1, 2], 1)]));
    assert_eq!((using.oldest, using.newest), (1, 2));
    assert_eq!(words(&using.held_up_by), ["osaka: still uses generation 1"]);
    let done = plan(&snapshot(2, 2, vec![member("w-1", &[1, 2], 2)], vec![other("osaka", 2, 2, &[1, 2], 0)]));
    assert_eq!((done.oldest, done.newest, done.minting, done.held_up_by), (2, 2, 2, vec![]));
}

#[test]
fn who_is_silent_or_unknown_holds_up() {
    let mut silent = snapshot(2, 1, vec![], vec![other("osaka", 2, 1, &[1, 2], 1)]);
    silent.others[0].heard = false;
    assert_eq!(plan(&silent).minting, 1);
    assert_eq!(words(&plan(&silent).held_up_by), ["osaka: is not heard"]);
    // Never heard of: nothing is unloaded, whatever the others say.
    let mut unknown = snapshot(5, 5, vec![], vec![other("osaka", 0, 0, &[], 0)]);
    assert_eq!((plan(&unknown).oldest, plan(&unknown).minting), (3, 5));
    unknown.others = vec![];
    assert_eq!(plan(&unknown).oldest, 5);
    // A router that has just started does not know who is there.
    unknown.settled = false;
    assert_eq!((plan(&unknown).oldest, plan(&unknown).keys.loaded.len()), (3, 0));
    // Nor does it know what a worker uses that came back without a report.
    unknown.settled = true;
    unknown.members = vec![Member { name: "w-1", loaded: &[], oldest: None, registered: true }];
    assert_eq!(plan(&unknown).oldest, 3);
    // Tickets under way.
    let tickets = Snapshot { under_way: 4, ..snapshot(5, 5, vec![], vec![]) };
    assert_eq!((plan(&tickets).oldest, plan(&tickets).keys.oldest), (4, 4));
    assert_eq!(words(&plan(&tickets).held_up_by), ["still uses generation 4"]);
}

#[test]
fn who_holds_a_number_and_never_spoke_holds_up() {
    let stranger = Member::unregistered("relay-1");
    let known = member("w-1", &[1, 2], 0);
    let strange = plan(&snapshot(2, 1, vec![known, stranger], vec![]));
    assert_eq!((strange.oldest, strange.newest, strange.minting), (1, 2, 1));
    assert!(strange.keys.loaded.is_empty(), "other regions must not count on it either");
    let why = ["relay-1: holds a number and has not registered with this router"];
    assert_eq!(words(&strange.held_up_by), why);
    // It may use anything that another router gave it.
    let minted = snapshot(2, 2, vec![known, stranger], vec![]);
    assert_eq!((plan(&minted).oldest, plan(&minted).minting), (1, 2));
    assert_eq!(words(&plan(&minted).held_up_by), why);
    assert_eq!(words(&too_early(&snapshot(3, 3, vec![stranger], vec![]), 4)), why);
    // It registers, or its number is free.
    for members in [vec![known, member("relay-1", &[1, 2], 0)], vec![known]] {
        assert_eq!(plan(&snapshot(2, 1, members, vec![])).minting, 2);
    }
}

#[test]
fn a_word_that_knows_nothing_leaves_the_last_one_in_force() {
    let mut keys = RegionKeys { wanted: 3, minting: 3, loaded: vec![2, 3], oldest: 2 };
    keys.heard(RegionKeys { wanted: 3, minting: 2, loaded: vec![], oldest: 0 });
    assert_eq!(keys, RegionKeys { wanted: 3, minting: 3, loaded: vec![], oldest: 2 });
    keys.heard(RegionKeys { wanted: 3, minting: 3, loaded: vec![2, 3], oldest: 0 });
    assert_eq!(keys.floor(), 3);
}

#[test]
fn a_region_goes_up_by_one_and_never_out_of_the_window() {
    assert_eq!(wanted(0, 0), Ok(0));
    assert_eq!(wanted(0, 2), Ok(2));
    assert_eq!(wanted(4, 4), Ok(4));
    assert_eq!(wanted(4, 3).unwrap_err().to_string(), "3 is below the present generation, 4: generations only go up");
    assert_eq!(wanted(4, 6).unwrap_err().to_string(), "6 is more than one above the present generation, 4");
    let lagging = snapshot(3, 3, vec![member("w-1", &[1, 2, 3], 1)], vec![other("osaka", 3, 2, &[1, 2, 3], 2)]);
    assert_eq!(words(&too_early(&lagging, 4)), ["w-1: still uses generation 1"]);
    let ready = snapshot(3, 3, vec![member("w-1", &[2, 3], 2)], vec![other("osaka", 3, 2, &[1, 2, 3], 2)]);
    assert!(too_early(&ready, 4).is_empty());
}

#[test]
fn a_region_that_forgot_everything_does_not_take_the_window_along() {
    let forgetful = plan(&snapshot(7, 7, vec![], vec![other("osaka", 1, 1, &[1], 1)]));
    assert!(forgetful.oldest <= 7 && forgetful.newest == 7);
}

/// A whole fleet: what processes really have and use, and what was said of it, which may be late or never arrive.
#[derive(Clone, Debug)]
struct Region {
    wanted: u32,
    minting: u32,
    plan: (u32, u32),
    worker: Process,
    relay: Process,
    /// What the router knows of them.
    heard: [(Vec<u32>, u32); 2],
    others: Vec<RegionKeys>,
    said: RegionKeys,
    /// Oldest generation that the worker may still be minting with.
    under_way: u32,
}

#[derive(Clone, Debug)]
struct Process {
    loaded: (u32, u32),
    minting: u32,
    /// Generations of live connections.
    live: Vec<u32>,
}

impl Process {
    fn report(&self) -> (Vec<u32>, u32) {
        ((self.loaded.0..=self.loaded.1).collect(), self.live.iter().copied().min().unwrap_or(0))
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Told(usize),
    Plan(usize),
    Worker(usize),
    Relay(usize),
    Report(usize),
    Digest(usize, usize),
    Call(usize),
    Renew(usize),
    End(usize),
}

fn step(regions: usize) -> impl Strategy<Value = Step> {
    let r = move || 0..regions;
    prop_oneof![
        1 => r().prop_map(Step::Told),
        4 => r().prop_map(Step::Plan),
        4 => r().prop_map(Step::Worker),
        4 => r().prop_map(Step::Relay),
        4 => r().prop_map(Step::Report),
        8 => (r(), r()).prop_map(|(a, b)| Step::Digest(a, b)),
        2 => r().prop_map(Step::Call),
        2 => r().prop_map(Step::Renew),
        1 => r().prop_map(Step::End),
    ]
}

#[derive(Debug)]
struct Fleet(Vec<Region>);

const NAMES: [&str; 3] = ["a", "b", "c"];

impl Fleet {
    fn new(regions: usize) -> Self {
        let process = Process { loaded: (1, 1), minting: 1, live: vec![] };
        let region = Region {
            wanted: 1,
            minting: 1,
            plan: (1, 1),
            worker: process.clone(),
            relay: process,
            heard: Default::default(),
            others: vec![RegionKeys::default(); regions],
            said: RegionKeys::default(),
            under_way: 1,
        };
        Self(vec![region; regions])
    }

    fn snapshot(&self, at: usize) -> Snapshot<'_> {
        let region = &self.0[at];
        let known = |(loaded, oldest): &(Vec<u32>, u32)| (!loaded.is_empty()).then_some(*oldest);
        Snapshot {
            wanted: region.wanted,
            minting: region.minting,
            under_way: region.under_way,
            settled: true,
            members: region
                .heard
                .iter()
                .map(|h| Member { name: "m", loaded: &h.0, oldest: known(h), registered: true })
                .collect(),
            others: (0..self.0.len())
                .filter(|other| *other != at)
                .map(|other| Other { name: NAMES[other], keys: region.others[other].clone(), heard: true })
                .collect(),
        }
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::Told(at) => {
                let asked = self.0[at].wanted + 1;
                if too_early(&self.snapshot(at), asked).is_empty() {
                    self.0[at].wanted = wanted(self.0[at].wanted, asked).unwrap();
                }
            }
            Step::Plan(at) => {
                let plan = plan(&self.snapshot(at));
                let region = &mut self.0[at];
                region.plan = (plan.oldest, plan.newest);
                region.minting = plan.minting;
                region.said = plan.keys;
            }
            // A directive arrives. All that the router had sent before it has arrived before it.
            Step::Worker(at) => {
                let region = &mut self.0[at];
                (region.worker.loaded, region.worker.minting) = (region.plan, region.minting);
                region.under_way = region.minting;
                region.heard[0] = region.worker.report();
            }
            Step::Relay(at) => self.0[at].relay.loaded = self.0[at].plan,
            Step::Report(at) => {
                let region = &mut self.0[at];
                region.heard = [region.worker.report(), region.relay.report()];
            }
            Step::Digest(from, to) if from != to => {
                let said = self.0[from].said.clone();
                self.0[to].others[from].heard(said);
            }
            Step::Digest(..) => {}
            Step::Call(at) => {
                let minting = self.0[at].worker.minting;
                self.0[at].worker.live.push(minting);
            }
            Step::Renew(at) => {
                let minting = self.0[at].worker.minting;
                if let Some(oldest) = self.0[at].worker.live.iter_mut().min() {
                    *oldest = minting;
                }
            }
            Step::End(at) => drop(self.0[at].worker.live.pop()),
        }
    }

    /// Every live connection's ID can be decoded by every relay and by its worker.
    fn check(&self) -> Result<(), TestCaseError> {
        for (at, region) in self.0.iter().enumerate() {
            let used = region.worker.live.iter().copied().chain([region.worker.minting]);
            for generation in used {
                for (there, other) in self.0.iter().enumerate() {
                    let (oldest, newest) = other.relay.loaded;
                    prop_assert!(
                        (oldest..=newest).contains(&generation),
                        "{at} uses {generation}, {there} has {oldest}..={newest}"
                    );
                }
                let (oldest, newest) = region.worker.loaded;
                prop_assert!((oldest..=newest).contains(&generation));
            }
            prop_assert!(region.relay.loaded.1 - region.relay.loaded.0 < WINDOW);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_frame_is_lost_and_every_rotation_ends(
        regions in 1_usize..=3,
        steps in prop::collection::vec(step(3), 0..400),
    ) {
        let mut fleet = Fleet::new(regions);
        for step in steps {
            let fits = match step {
                Step::Digest(a, b) => a.max(b) < regions,
                Step::Told(r) | Step::Plan(r) | Step::Worker(r) | Step::Relay(r) | Step::Report(r) | Step::Call(r)
                | Step::Renew(r) | Step::End(r) => r < regions,
            };
            if fits {
                fleet.run(step);
                fleet.check()?;
            }
        }
        // Once everybody was told the same and messages arrive, all have moved, and the old ones are gone.
        let newest = fleet.0.iter().map(|r| r.wanted).max().unwrap();
        for _ in 0..40 {
            for at in 0..regions {
                if fleet.0[at].wanted < newest {
                    fleet.run(Step::Told(at));
                }
                for step in [Step::Plan(at), Step::Worker(at), Step::Relay(at), Step::Report(at), Step::Plan(at)] {
                    fleet.run(step);
                    fleet.check()?;
                }
                for to in 0..regions {
                    fleet.run(Step::Digest(at, to));
                }
                let live = fleet.0[at].worker.live.len();
                for _ in 0..live {
                    fleet.run(Step::Renew(at));
                }
            }
        }
        for at in 0..regions {
            let plan = plan(&fleet.snapshot(at));
            prop_assert_eq!((plan.oldest, plan.newest, plan.minting), (newest, newest, newest));
            prop_assert_eq!(plan.held_up_by, vec![]);
        }
    }
}
