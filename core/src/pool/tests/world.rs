//! A cluster in miniature: an API server, a scheduler, kubelets, workers with calls, the ReplicaSet controller as
//! Kubernetes has it, and an operator that carries plans out on views of any age and may die between any two steps.

use std::collections::BTreeMap;

use super::super::*;
use crate::rollout::Strategy;

/// A deletion cost, and when it was written.
type Cost = (bool, u64);

#[derive(Clone, Debug)]
pub(super) struct Pod {
    pub(super) name: String,
    pub(super) revision: String,
    pub(super) state: PodState,
    pub(super) node: Option<usize>,
    created: u64,
    ready_at: u64,
    mark: Option<Millis>,
    /// Every value it ever had, the last one is present.
    costs: Vec<Cost>,
    pub(super) calls: u32,
    pub(super) phase: Phase,
    deadline: Option<Millis>,
    pub(super) registered: bool,
    order: Option<DrainOrder>,
}

#[derive(Clone, Debug)]
pub(super) struct Set {
    pub(super) revision: String,
    pub(super) replicas: u32,
    report: Option<SetReport>,
    created: u64,
    /// Grows with every write.
    version: u64,
}

#[derive(Clone, Debug, Default)]
struct View {
    sets: Vec<Set>,
    pods: Vec<Pod>,
    fleet: BTreeMap<String, (Phase, u32)>,
}

/// What the operator holds in memory; lost when it dies.
#[derive(Clone, Debug, Default)]
struct Operator {
    view: View,
    seen_costs: BTreeMap<String, (bool, u64)>,
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) now: u64,
    pub(super) sets: Vec<Set>,
    pub(super) pods: Vec<Pod>,
    /// Workers that fit on each node.
    pub(super) nodes: Vec<u32>,
    pub(super) unschedulable: Vec<bool>,
    pub(super) policy: Policy,
    operator: Operator,
    /// How far behind the ReplicaSet controller's view of costs is; less than [`SETTLE`].
    pub(super) lag: u64,
    made: u64,
    /// Wrongs that were seen.
    pub(super) wrongs: Vec<String>,
    /// Pods that a controller or the operator deleted.
    pub(super) deleted: Vec<String>,
}

impl World {
    pub(super) fn new(target: u32, nodes: Vec<u32>, strategy: Strategy) -> Self {
        let rollout = RolloutPolicy { revision: "r1".into(), strategy, max_surge: 1, canary: None, paused: false };
        Self {
            now: 1_000_000,
            sets: Vec::new(),
            pods: Vec::new(),
            unschedulable: vec![false; nodes.len()],
            nodes,
            policy: Policy { target, rollout, drain_deadline: Duration::from_secs(600), history: 2 },
            operator: Operator::default(),
            lag: 900,
            made: 0,
            wrongs: Vec::new(),
            deleted: Vec::new(),
        }
    }

    // ---- Kubernetes ------------------------------------------------------------------------------------------

    /// The ReplicaSet controller looks at every set once.
    pub(super) fn replica_sets(&mut self) {
        for index in 0..self.sets.len() {
            let Set { revision, replicas, .. } = self.sets[index].clone();
            let active = |world: &Self| {
                let is = |pod: &&Pod| pod.revision == revision && pod.state != PodState::Leaving;
                world.pods.iter().filter(is).map(|pod| pod.name.clone()).collect::<Vec<_>>()
            };
            let mut names = active(self);
            for _ in names.len()..replicas as usize {
                self.create(&revision);
            }
            names.sort_by_key(|name| self.place(name));
            let surplus = names.len().saturating_sub(replicas as usize);
            for name in &names[..surplus] {
                self.delete(name, "the ReplicaSet");
            }
            let names = active(self);
            let ready = names.iter().filter(|name| self.pod(name).state == PodState::Ready).count();
            let report = Some(SetReport { replicas: names.len() as u32, ready: ready as u32 });
            if self.sets[index].report != report {
                self.sets[index].report = report;
                self.sets[index].version += 1;
            }
        }
    }

    /// In which order its ReplicaSet removes it. Where Kubernetes goes by node or age, the worst is assumed: the busiest
    /// goes first.
    fn place(&self, name: &str) -> (u8, bool, std::cmp::Reverse<u32>, std::cmp::Reverse<u64>) {
        let pod = self.pod(name);
        let seen = pod.costs.iter().rev().find(|(_, at)| self.now - at >= self.lag).unwrap_or(&pod.costs[0]);
        (removal::rank(pod.state), !seen.0, std::cmp::Reverse(pod.calls), std::cmp::Reverse(pod.ready_at))
    }

    fn create(&mut self, revision: &str) {
        self.made += 1;
        self.pods.push(Pod {
            name: format!("{revision}-{:03}", self.made),
            revision: revision.into(),
            state: PodState::Unscheduled { since: None },
            node: None,
            created: self.now,
            ready_at: 0,
            mark: None,
            costs: vec![(false, self.now)],
            calls: 0,
            phase: Phase::Active,
            deadline: None,
            registered: false,
            order: None,
        });
    }

    fn delete(&mut self, name: &str, who: &str) {
        let now = self.now;
        let pod = self.pod_mut(name);
        let over = pod.deadline.is_some_and(|deadline| now >= deadline.0);
        let wrong = (pod.calls > 0 && !over).then(|| format!("{who} deleted {pod:?} at {now}"));
        pod.state = PodState::Leaving;
        self.deleted.push(name.into());
        self.wrongs.extend(wrong);
    }

    /// Pods get nodes as far as there is room; those that get none are told so.
    pub(super) fn schedule(&mut self) {
        for index in 0..self.pods.len() {
            if !matches!(self.pods[index].state, PodState::Unscheduled { .. }) {
                continue;
            }
            let used = |node: usize| self.pods.iter().filter(|pod| pod.node == Some(node)).count() as u32;
            let free = (0..self.nodes.len()).find(|node| !self.unschedulable[*node] && used(*node) < self.nodes[*node]);
            let now = Millis(self.now);
            let pod = &mut self.pods[index];
            match (free, pod.state) {
                (Some(node), _) => (pod.node, pod.state) = (Some(node), PodState::Pending),
                (None, PodState::Unscheduled { since: None }) => pod.state = PodState::Unscheduled { since: Some(now) },
                (None, _) => {}
            }
        }
    }

    /// The kubelets: one step on for pods that are starting or ending.
    pub(super) fn kubelets(&mut self, which: usize) {
        let now = self.now;
        let started: Vec<usize> = (0..self.pods.len())
            .filter(|i| matches!(self.pods[*i].state, PodState::Pending | PodState::NotReady | PodState::Leaving))
            .collect();
        let Some(index) = started.get(which % started.len().max(1)).copied() else { return };
        let under_way = self.is_going_down(&self.pods[index].revision);
        let pod = &mut self.pods[index];
        match pod.state {
            PodState::Pending => pod.state = PodState::NotReady,
            // Starting takes longer than the controller's look at a count that went down.
            PodState::NotReady if under_way => {}
            PodState::NotReady => {
                (pod.state, pod.registered, pod.ready_at) = (PodState::Ready, true, now);
            }
            _ => drop(self.pods.remove(index)),
        }
    }

    // ---- people and callers ------------------------------------------------------------------------------------

    pub(super) fn call(&mut self, which: usize) {
        let takes = |pod: &&mut Pod| pod.registered && pod.phase == Phase::Active && pod.state == PodState::Ready;
        let mut workers: Vec<&mut Pod> = self.pods.iter_mut().filter(takes).collect();
        let count = workers.len().max(1);
        if let Some(worker) = workers.get_mut(which % count) {
            worker.calls += 1;
        }
    }

    pub(super) fn hang_up(&mut self, which: usize) {
        let mut busy: Vec<&mut Pod> = self.pods.iter_mut().filter(|pod| pod.calls > 0).collect();
        let count = busy.len().max(1);
        if let Some(worker) = busy.get_mut(which % count) {
            worker.calls -= 1;
        }
    }

    /// Its readiness probe fails though it holds calls. Kubernetes knows at once: of a pod that becomes unready between
    /// a count's going down and the controller's look at it nobody can say who goes.
    pub(super) fn flap(&mut self, which: usize) {
        let count = self.pods.len().max(1);
        let Some(pod) = self.pods.get(which % count).filter(|pod| pod.state == PodState::Ready) else { return };
        if self.is_going_down(&pod.revision) {
            return;
        }
        self.pods[which % count].state = PodState::NotReady;
        self.replica_sets();
    }

    /// Somebody deletes a pod by hand: its calls are that person's.
    pub(super) fn delete_by_hand(&mut self, which: usize) {
        let count = self.pods.len().max(1);
        if let Some(pod) = self.pods.get_mut(which % count) {
            pod.state = PodState::Leaving;
        }
    }

    pub(super) fn order(&mut self, which: usize, order: Option<DrainOrder>) {
        let count = self.pods.len().max(1);
        if let Some(pod) = self.pods.get_mut(which % count) {
            pod.order = order;
        }
    }

    pub(super) fn pass(&mut self, millis: u64) {
        self.now += millis;
        let now = Millis(self.now);
        for pod in &mut self.pods {
            if pod.phase == Phase::Draining && pod.deadline.is_some_and(|deadline| now >= deadline) {
                pod.calls = 0;
            }
        }
    }

    // ---- the operator --------------------------------------------------------------------------------------------

    /// One of its three watches catches up.
    pub(super) fn watch(&mut self, which: usize) {
        match which % 3 {
            0 => self.operator.view.sets.clone_from(&self.sets),
            1 => self.operator.view.pods.clone_from(&self.pods),
            _ => self.operator.view.fleet = self.fleet(),
        }
        self.see_costs();
    }

    pub(super) fn restart(&mut self) {
        self.operator = Operator::default();
        self.read();
    }

    fn read(&mut self) {
        (0..3).for_each(|which| self.watch(which));
    }

    fn fleet(&self) -> BTreeMap<String, (Phase, u32)> {
        let registered = self.pods.iter().filter(|pod| pod.registered);
        registered.map(|pod| (pod.name.clone(), (pod.phase, pod.calls))).collect()
    }

    fn see_costs(&mut self) {
        for pod in &self.operator.view.pods {
            let cost = pod.costs.last().expect("a pod has a cost").0;
            let seen = self.operator.seen_costs.entry(pod.name.clone()).or_insert((cost, self.now));
            if seen.0 != cost {
                *seen = (cost, self.now);
            }
        }
    }

    pub(super) fn snapshot(&self) -> PoolSnapshot {
        let view = &self.operator.view;
        let sets = view.sets.iter().map(|set| SetView {
            revision: set.revision.clone(),
            replicas: set.replicas,
            report: set.report,
            created: Millis(set.created),
        });
        let workers = view.pods.iter().map(|pod| WorkerView {
            name: pod.name.clone(),
            revision: pod.revision.clone(),
            pod: pod.state,
            created: Millis(pod.created),
            calls: match view.fleet.get(&pod.name) {
                Some((phase, count)) => Calls::Held { phase: *phase, count: *count },
                None if pod.state == PodState::Ready => Calls::Unknown,
                None => Calls::None,
            },
            missing: false,
            mark: pod.mark,
            released: pod.costs.last().is_some_and(|cost| cost.0),
            cost_since: Millis(self.operator.seen_costs[&pod.name].1),
            order: pod
                .order
                .or_else(|| pod.node.filter(|node| self.unschedulable[*node]).map(|_| DrainOrder::ReplaceInTurn)),
        });
        PoolSnapshot { sets: sets.collect(), workers: workers.collect() }
    }

    /// Plans on what it has seen and carries out as many steps as it lives to.
    pub(super) fn reconcile(&mut self, lives_for: usize) -> PoolPlan {
        let mut planned = plan(&self.snapshot(), &self.policy, Millis(self.now));
        if planned.steps.iter().any(Step::is_final) {
            self.read();
            planned = plan(&self.snapshot(), &self.policy, Millis(self.now));
        }
        for (index, step) in planned.steps.iter().enumerate() {
            if index == lives_for {
                self.restart();
                break;
            }
            if self.carry_out(step).is_none() {
                break;
            }
        }
        planned
    }

    /// `None`: refused.
    fn carry_out(&mut self, step: &Step) -> Option<()> {
        match step {
            Step::Scale { revision, from: None, to, .. } => {
                if self.sets.iter().any(|set| set.revision == *revision) {
                    return None;
                }
                let (revision, created) = (revision.clone(), self.now);
                let set = Set { revision, replicas: *to, report: None, created, version: 0 };
                self.operator.view.sets.push(set.clone());
                self.sets.push(set);
            }
            Step::Scale { revision, to, .. } => {
                let seen = self.operator.view.sets.iter_mut().find(|set| set.revision == *revision)?;
                let set = self.sets.iter_mut().find(|set| set.revision == *revision && set.version == seen.version)?;
                (set.replicas, set.report, set.version) = (*to, None, seen.version + 1);
                seen.clone_from(set);
            }
            Step::SetPhase { worker, phase, deadline } => {
                let pod = self.pods.iter_mut().find(|pod| pod.name == *worker && pod.registered)?;
                (pod.phase, pod.deadline) = (*phase, *deadline);
                let answer = (pod.phase, pod.calls);
                self.operator.view.fleet.insert(worker.clone(), answer);
            }
            Step::Mark { worker, deadline, .. } => self.patch(worker, |pod, _| pod.mark = Some(*deadline))?,
            Step::Unmark { worker } => self.patch(worker, |pod, _| pod.mark = None)?,
            Step::Release { worker } => self.patch(worker, |pod, now| pod.costs.push((true, now)))?,
            Step::Restore { worker } => self.patch(worker, |pod, now| pod.costs.push((false, now)))?,
            Step::Delete { worker } => {
                self.pods.iter().find(|pod| pod.name == *worker && pod.state != PodState::Leaving)?;
                self.delete(worker, "the operator");
            }
            Step::DeleteSet { revision } => {
                assert!(self.pods.iter().all(|pod| pod.revision != *revision), "{revision} still has pods");
                self.sets.retain(|set| set.revision != *revision);
            }
        }
        Some(())
    }

    /// A write to a pod. As with every write, the operator takes the answer into its view.
    fn patch(&mut self, name: &str, write: impl Fn(&mut Pod, u64)) -> Option<()> {
        let now = self.now;
        let pod = self.pods.iter_mut().find(|pod| pod.name == name)?;
        write(pod, now);
        let written = pod.clone();
        let seen = self.operator.view.pods.iter_mut().find(|pod| pod.name == name)?;
        *seen = written;
        self.see_costs();
        Some(())
    }

    // ---- what is looked at ---------------------------------------------------------------------------------------

    pub(super) fn pod(&self, name: &str) -> &Pod {
        self.pods.iter().find(|pod| pod.name == name).expect("the pod is there")
    }

    fn pod_mut(&mut self, name: &str) -> &mut Pod {
        self.pods.iter_mut().find(|pod| pod.name == name).expect("the pod is there")
    }

    pub(super) fn of(&self, revision: &str) -> usize {
        self.pods.iter().filter(|pod| pod.revision == revision && pod.state != PodState::Leaving).count()
    }

    /// The count of its ReplicaSet went down, and the controller has not looked yet.
    fn is_going_down(&self, revision: &str) -> bool {
        self.sets.iter().any(|set| set.revision == revision && self.of(revision) > set.replicas as usize)
    }

    /// Workers that take calls.
    pub(super) fn serving(&self) -> Vec<&Pod> {
        let serves = |pod: &&Pod| pod.state == PodState::Ready && pod.registered && pod.phase == Phase::Active;
        self.pods.iter().filter(serves).collect()
    }

    /// Everything works and is seen at once, until nothing changes any more or `rounds` are over.
    pub(super) fn settle(&mut self, rounds: usize) -> PoolPlan {
        let mut last = None;
        for _ in 0..rounds {
            self.pass(700);
            self.replica_sets();
            self.schedule();
            (0..4).for_each(|which| self.kubelets(which));
            self.read();
            let planned = self.reconcile(usize::MAX);
            last = Some(planned);
        }
        last.expect("there was a round")
    }
}
