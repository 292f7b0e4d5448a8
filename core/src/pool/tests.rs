mod world;

use proptest::prelude::*;

use super::*;
use crate::rollout::{Stage, Strategy as RolloutStrategy};
use world::World;

/// One thing that happens.
#[derive(Clone, Copy, Debug)]
enum Event {
    ReplicaSets,
    Schedule,
    Kubelet(usize),
    Pass(u64),
    Call(usize),
    HangUp(usize),
    Watch(usize),
    Reconcile,
    /// The operator dies after so many steps.
    Die(usize),
    Restart,
    Scale(u32),
    Revision(u8),
    Pause(bool),
    Canary(Option<u32>),
    Unschedulable(usize, bool),
    Order(usize, u8),
    Flap(usize),
    DeleteByHand(usize),
}

/// What goes on in a cluster all the time.
fn ordinary() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => Just(Event::ReplicaSets),
        4 => Just(Event::Schedule),
        8 => any::<usize>().prop_map(Event::Kubelet),
        6 => (1_u64..1_500).prop_map(Event::Pass),
        8 => any::<usize>().prop_map(Event::Call),
        6 => any::<usize>().prop_map(Event::HangUp),
        8 => any::<usize>().prop_map(Event::Watch),
        8 => Just(Event::Reconcile),
        2 => (0_usize..4).prop_map(Event::Die),
        1 => Just(Event::Restart),
    ]
}

/// What people do, and what goes wrong.
fn extraordinary() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0_u32..7).prop_map(Event::Scale),
        3 => (1_u8..4).prop_map(Event::Revision),
        1 => any::<bool>().prop_map(Event::Pause),
        1 => proptest::option::of(0_u32..4).prop_map(Event::Canary),
        1 => (0_usize..3, any::<bool>()).prop_map(|(node, is)| Event::Unschedulable(node, is)),
        2 => (any::<usize>(), 0_u8..6).prop_map(|(pod, order)| Event::Order(pod, order)),
        1 => any::<usize>().prop_map(Event::Flap),
        1 => any::<usize>().prop_map(Event::DeleteByHand),
        1 => (1_u64..900_000).prop_map(Event::Pass),
    ]
}

fn anything() -> impl Strategy<Value = Event> {
    prop_oneof![8 => ordinary(), 2 => extraordinary()]
}

fn strategy() -> impl Strategy<Value = RolloutStrategy> {
    prop_oneof![Just(RolloutStrategy::SurgeFirst), Just(RolloutStrategy::DrainFirst), Just(RolloutStrategy::Auto),]
}

fn happen(world: &mut World, event: Event) {
    match event {
        Event::ReplicaSets => world.replica_sets(),
        Event::Schedule => world.schedule(),
        Event::Kubelet(which) => world.kubelets(which),
        Event::Pass(millis) => world.pass(millis),
        Event::Call(which) => world.call(which),
        Event::HangUp(which) => world.hang_up(which),
        Event::Watch(which) => world.watch(which),
        Event::Reconcile => drop(world.reconcile(usize::MAX)),
        Event::Die(steps) => drop(world.reconcile(steps)),
        Event::Restart => world.restart(),
        Event::Scale(target) => world.policy.target = target,
        Event::Revision(revision) => world.policy.rollout.revision = format!("r{revision}"),
        Event::Pause(paused) => world.policy.rollout.paused = paused,
        Event::Canary(canary) => world.policy.rollout.canary = canary,
        Event::Unschedulable(node, is) => world.unschedulable[node] = is,
        Event::Order(which, order) => {
            let deadline = Millis(world.now + 60_000);
            world.order(
                which,
                match order {
                    0 => Some(DrainOrder::Cordon),
                    1 => Some(DrainOrder::Empty { deadline }),
                    2 => Some(DrainOrder::Replace { deadline }),
                    3 => Some(DrainOrder::ReplaceInTurn),
                    _ => None,
                },
            );
        }
        Event::Flap(which) => world.flap(which),
        Event::DeleteByHand(which) => world.delete_by_hand(which),
    }
}

/// Everybody hangs up, nobody wants anything special any more, and all works.
fn calm(world: &mut World) {
    for _ in 0..10_000 {
        world.hang_up(0);
    }
    for which in 0..world.pods.len() {
        world.order(which, None);
    }
    world.unschedulable.fill(false);
    world.policy.rollout.paused = false;
    world.policy.rollout.canary = None;
    if world.policy.rollout.strategy == RolloutStrategy::SurgeFirst {
        // It would wait for room for ever, as it is asked to.
        world.nodes[0] += 20;
    }
}

fn assert_converged(world: &World, last: &PoolPlan) {
    let revision = &world.policy.rollout.revision;
    let state = || format!("{last:#?}\n{:#?}\n{:#?}", world.sets, world.pods);
    assert_eq!(world.serving().len(), world.policy.target as usize, "{}", state());
    assert!(world.serving().iter().all(|pod| pod.revision == *revision), "{}", state());
    assert_eq!(world.pods.len(), world.policy.target as usize, "{}", state());
    assert_eq!(last.steps, [], "{}", state());
    assert_eq!((last.progress.stage, last.progress.draining), (Stage::Complete, 0));
    assert!(world.snapshot().workers.iter().all(|worker| !worker.released && worker.mark.is_none()));
    assert!(world.sets.len() <= 1 + world.policy.history);
}

proptest! {
    /// Whatever happens, in whatever order, and however old the operator's views are: nobody who holds calls is deleted
    /// before its drain ended, and when it is calm the number that was set last stands.
    #[test]
    fn no_busy_worker_is_deleted_and_the_number_stands(
        target in 0_u32..6,
        strategy in strategy(),
        room in 2_u32..5,
        lag in 0_u64..1_000,
        events in proptest::collection::vec(anything(), 0..250),
    ) {
        let mut world = World::new(target, vec![room; 3], strategy);
        world.lag = lag;
        world.restart();
        for event in events {
            happen(&mut world, event);
            prop_assert_eq!(&world.wrongs, &Vec::<String>::new());
        }
        calm(&mut world);
        let last = world.settle(250);
        prop_assert_eq!(&world.wrongs, &Vec::<String>::new());
        assert_converged(&world, &last);
    }

    /// Rollouts while nodes have room, in either order of strategies that may surge: capacity never falls, and there
    /// are never more workers than the surge allows.
    #[test]
    fn capacity_never_falls_while_there_is_room_for_one_more(
        target in 1_u32..6,
        auto in any::<bool>(),
        restarts in 0_usize..3,
        events in proptest::collection::vec(ordinary(), 50..400),
    ) {
        let strategy = if auto { RolloutStrategy::Auto } else { RolloutStrategy::SurgeFirst };
        let mut world = World::new(target, vec![40], strategy);
        let last = world.settle(60);
        assert_converged(&world, &last);
        for (at, event) in events.into_iter().enumerate() {
            if at % 120 == 0 {
                world.policy.rollout.revision = format!("r{}", 2 + at / 120 + restarts);
            }
            happen(&mut world, event);
            prop_assert_eq!(&world.wrongs, &Vec::<String>::new());
            prop_assert!(world.serving().len() >= target as usize, "{:#?}", world.pods);
            let pods: u32 = world.sets.iter().map(|set| set.replicas).sum();
            prop_assert!(pods <= target + 1, "{:#?}", world.sets);
        }
    }
}

/// A pool of `target` ready workers on one node with room for `room`.
fn ready(target: u32, room: u32, strategy: RolloutStrategy) -> World {
    let mut world = World::new(target, vec![room, 0], strategy);
    let last = world.settle(40);
    assert_converged(&world, &last);
    world
}

#[test]
fn idle_workers_go_first_and_busy_ones_keep_their_calls() {
    let mut world = ready(4, 10, RolloutStrategy::Auto);
    world.pods[0].calls = 3;
    world.pods[2].calls = 1;
    let busy = [world.pods[0].name.clone(), world.pods[2].name.clone()];
    world.policy.target = 2;
    world.settle(20);
    let left: Vec<String> = world.serving().iter().map(|pod| pod.name.clone()).collect();
    assert_eq!(left, busy);

    world.policy.target = 1;
    let last = world.settle(20);
    assert_eq!(last.leaving, [busy[1].clone()], "the one with fewer calls");
    assert_eq!(world.pods.len(), 2, "its call goes on");
    assert_eq!((last.progress.replicas, last.progress.draining), (1, 1));
    world.pass(600_000);
    world.settle(5);
    assert_eq!(world.pods.len(), 1, "the deadline ended the call");
    assert_eq!(world.wrongs, [""; 0]);
}

#[test]
fn one_that_becomes_idle_takes_the_place_of_one_that_drains() {
    let mut world = ready(3, 10, RolloutStrategy::Auto);
    for (pod, calls) in world.pods.iter_mut().zip([1, 2, 3]) {
        pod.calls = calls;
    }
    world.policy.target = 2;
    let first = world.pods[0].name.clone();
    assert_eq!(world.settle(3).leaving, std::slice::from_ref(&first));
    let idle = world.pods[2].name.clone();
    world.pods[2].calls = 0;
    world.settle(10);
    assert_eq!(world.deleted, [idle]);
    assert_eq!(world.pod(&first).phase, Phase::Active);
}

#[test]
fn a_change_of_mind_brings_draining_workers_back() {
    let mut world = ready(3, 10, RolloutStrategy::Auto);
    world.pods.iter_mut().for_each(|pod| pod.calls = 1);
    world.policy.target = 1;
    assert_eq!(world.settle(4).progress.draining, 2);
    world.policy.target = 3;
    world.settle(4);
    assert_eq!((world.serving().len(), world.deleted.len()), (3, 0));
    assert!(world.snapshot().workers.iter().all(|worker| worker.mark.is_none()));
}

#[test]
fn auto_drains_an_old_worker_when_no_node_has_room() {
    for (strategy, done) in
        [(RolloutStrategy::Auto, true), (RolloutStrategy::DrainFirst, true), (RolloutStrategy::SurgeFirst, false)]
    {
        let mut world = ready(2, 2, strategy);
        world.pods.iter_mut().for_each(|pod| pod.calls = 1);
        world.policy.rollout.revision = "r2".into();
        let last = world.settle(40);
        let expected = match strategy {
            RolloutStrategy::Auto => (Stage::DrainingForRoom, 1),
            RolloutStrategy::DrainFirst => (Stage::Progressing, 1),
            RolloutStrategy::SurgeFirst => (Stage::WaitingForRoom, 0),
        };
        assert_eq!((last.progress.stage, last.progress.draining), expected, "{strategy:?}");
        world.pods.iter_mut().for_each(|pod| pod.calls = 0);
        let last = world.settle(150);
        assert_eq!(last.progress.stage == Stage::Complete, done, "{strategy:?}");
        assert_eq!(world.of("r2") == 2, done, "{strategy:?}");
    }
}

#[test]
fn scaling_in_the_middle_of_a_rollout_keeps_the_number() {
    let mut world = ready(4, 10, RolloutStrategy::SurgeFirst);
    world.policy.rollout.revision = "r2".into();
    world.settle(6);
    assert!(world.of("r1") > 0 && world.of("r2") > 0);
    world.policy.target = 2;
    world.settle(3);
    world.policy.target = 6;
    let last = world.settle(80);
    assert_converged(&world, &last);
    assert_eq!(world.of("r2"), 6);
}

#[test]
fn pause_undoes_half_way_and_rollback_takes_the_kept_revision() {
    let mut world = ready(3, 10, RolloutStrategy::SurgeFirst);
    world.policy.rollout.revision = "r2".into();
    world.settle(6);
    world.policy.rollout.paused = true;
    let last = world.settle(40);
    assert_eq!(last.progress.stage, Stage::Paused);
    assert_eq!((world.serving().len(), last.progress.draining), (3, 0));
    let kept = (world.of("r1"), world.of("r2"));
    assert_eq!((world.settle(5).steps, (world.of("r1"), world.of("r2"))), (Vec::new(), kept));
    world.policy.rollout.revision = "r1".into();
    world.policy.rollout.paused = false;
    let last = world.settle(60);
    assert_converged(&world, &last);
    assert_eq!((world.of("r1"), world.of("r2")), (3, 0));
    assert_eq!(world.sets.len(), 2, "the other one is kept to go back to");
}

#[test]
fn a_canary_stays_as_large_as_it_was_asked_for() {
    let mut world = ready(4, 10, RolloutStrategy::SurgeFirst);
    world.policy.rollout.revision = "r2".into();
    world.policy.rollout.canary = Some(1);
    let last = world.settle(40);
    assert_eq!((last.progress.stage, last.progress.updated_serving), (Stage::Canary, 1));
    assert_eq!((world.of("r1"), world.of("r2"), world.serving().len()), (3, 1, 4));
    world.policy.target = 6;
    world.settle(40);
    assert_eq!((world.of("r1"), world.of("r2")), (5, 1));
    world.policy.rollout.canary = None;
    let last = world.settle(80);
    assert_converged(&world, &last);
}

#[test]
fn workers_of_a_node_that_takes_no_pods_are_replaced_then_drained() {
    let mut world = ready(2, 10, RolloutStrategy::Auto);
    world.nodes[1] = 10;
    world.unschedulable[0] = true;
    let before: Vec<String> = world.pods.iter().map(|pod| pod.name.clone()).collect();
    world.pods[0].calls = 1;
    world.settle(60);
    assert!(world.pods.iter().filter(|pod| !before.contains(&pod.name)).all(|pod| pod.node == Some(1)));
    assert_eq!(world.serving().len(), 2);
    assert_eq!(world.pod(&before[0]).calls, 1, "its call goes on");
    world.unschedulable[0] = false;
    world.pods.iter_mut().for_each(|pod| pod.calls = 0);
    let last = world.settle(40);
    assert_converged(&world, &last);
}

#[test]
fn a_drained_worker_whose_successor_finds_no_room_makes_room_for_it() {
    let mut world = ready(2, 2, RolloutStrategy::Auto);
    let deadline = Millis(world.now + 600_000);
    world.order(0, Some(DrainOrder::Replace { deadline }));
    let gone = world.pods[0].name.clone();
    let last = world.settle(150);
    assert_eq!(world.deleted[0], gone);
    assert_converged(&world, &last);
}

#[test]
fn a_drained_pool_stays_and_comes_back() {
    let mut world = ready(2, 4, RolloutStrategy::Auto);
    let deadline = Millis(world.now + 600_000);
    (0..2).for_each(|which| world.order(which, Some(DrainOrder::Empty { deadline })));
    let last = world.settle(40);
    assert_eq!((world.serving().len(), world.pods.len(), last.steps.len()), (0, 2, 0));
    assert_eq!((last.progress.replicas, last.progress.emptied, last.progress.stage), (0, 2, Stage::Complete));
    (0..2).for_each(|which| world.order(which, None));
    let last = world.settle(10);
    assert_converged(&world, &last);
    assert_eq!(world.deleted, [""; 0]);
}

#[test]
fn an_unready_worker_that_stays_is_not_taken_in_place_of_a_drained_one() {
    let mut world = ready(3, 10, RolloutStrategy::Auto);
    let drained = world.pods[0].name.clone();
    let unready = world.pods[1].name.clone();
    world.pods[1].calls = 1;
    world.pods[2].calls = 2;
    world.policy.target = 2;
    world.settle(1);
    world.flap(1);
    for _ in 0..200 {
        world.pass(700);
        world.replica_sets();
        world.schedule();
        (0..3).for_each(|which| world.watch(which));
        world.reconcile(usize::MAX);
    }
    assert_eq!(world.deleted[0], drained);
    assert_eq!(world.pod(&unready).state, PodState::NotReady);
    assert_eq!(world.wrongs, [""; 0]);
    assert_eq!(world.of("r1"), 2);
}

#[test]
fn workers_that_are_out_of_touch_are_replaced_and_not_deleted() {
    let mut world = ready(2, 4, RolloutStrategy::Auto);
    let mut snapshot = world.snapshot();
    snapshot.workers[0].missing = true;
    snapshot.workers[0].pod = PodState::NotReady;
    snapshot.workers[0].calls = Calls::Unknown;
    let planned = plan(&snapshot, &world.policy, Millis(world.now));
    let raised = Step::Scale { revision: "r1".into(), from: Some(2), to: 3, expected: vec![] };
    assert_eq!((planned.steps, planned.progress.missing), (vec![raised], 1));
    world.policy.target = 0;
    let planned = plan(&snapshot, &world.policy, Millis(world.now));
    assert_eq!(planned.leaving.len(), 2, "where nobody is to stay, it goes as well");
}

#[test]
fn a_pod_that_goes_without_having_been_released_is_named() {
    let mut world = ready(2, 4, RolloutStrategy::Auto);
    let name = world.pods[1].name.clone();
    world.delete_by_hand(1);
    (0..3).for_each(|which| world.watch(which));
    assert_eq!(world.reconcile(usize::MAX).undrained, [name]);
}
