#!/usr/bin/env bash
# A real SLURM of one node for tests, on loopback, without systemd and cgroups; run as root.
#   apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge   (Debian)
#   one-node.sh start DIR    prints the SLURM_CONF to export
#   one-node.sh stop DIR
# Partitions: low (default, pre-empted by requeue) and high. SLURM_PORT: the first of 102 ports.
set -euo pipefail
action=${1:?start or stop}
dir=$(realpath -m "${2:?a folder}")
port=${SLURM_PORT:-26817}
node=$(hostname -s)
export SLURM_CONF=$dir/etc/slurm.conf
write_conf() {
  mkdir -p "$dir"/{etc,run,log,state,spool}
  chown munge:munge "$dir/run" "$dir/log"
  chmod 755 "$dir" "$dir/run" "$dir/log"
  cat > "$SLURM_CONF" << CONF
ClusterName=tiny
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SrunPortRange=$((port + 2))-$((port + 101))
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
SlurmdParameters=config_overrides
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MinJobAge=900
KillWait=3
ReturnToService=2
SlurmdTimeout=30
MailProg=/bin/true
NodeName=$node NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=$node Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=${GRACE_TIME:-5} MaxTime=4:00:00 State=UP
PartitionName=high Nodes=$node PriorityTier=10 PreemptMode=OFF MaxTime=4:00:00 State=UP
CONF
}
case $action in
  start)
    write_conf
    runuser -u munge -- munged --socket="$dir/run/munge.socket" --pid-file="$dir/run/munged.pid" \
      --log-file="$dir/log/munged.log" --seed-file="$dir/run/munged.seed"
    slurmctld -i
    slurmd -N "$node"
    for _ in $(seq 100); do
      [ "$(sinfo -h -N -p low -o %T 2> /dev/null)" = idle ] && break
      sleep 0.1
    done
    echo "$SLURM_CONF" ;;
  stop)
    scancel -u root -Q 2> /dev/null || true
    for program in slurmd slurmctld munged; do
      file=$dir/run/$program.pid
      [ ! -s "$file" ] || kill "$(cat "$file")" 2> /dev/null || true
    done ;;
  *) echo "start or stop" >&2; exit 2 ;;
esac
