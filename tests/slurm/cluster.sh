#!/usr/bin/env bash
# A slurm of two nodes on loopback, with accounting (slurmdbd on MariaDB), as root on Debian:
#     cluster.sh install | start | stop
# Its files are in $SLURM_HOME; /etc/slurm and the nodes' names in /etc/hosts are outside of it.
set -euo pipefail
home=${SLURM_HOME:-${TMPDIR:-/tmp}/slurm-loopback}

stop() {
  for pid in "$home"/*.pid; do
    if [ -f "$pid" ]; then kill "$(cat "$pid")" 2>/dev/null || true; fi
  done
}
case ${1:-} in
install)
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client slurmdbd munge mariadb-server
  ;;
start)
  stop
  rm -rf "$home"
  mkdir -p "$home"/{state,n1,n2,db} /etc/slurm /run/munge /run/mysqld
  chown munge /run/munge
  grep -q ' n1 n2$' /etc/hosts || echo '127.0.0.1 n1 n2' >> /etc/hosts
  cat > /etc/slurm/slurmdbd.conf <<CONF
AuthType=auth/munge
DbdHost=localhost
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
PidFile=$home/slurmdbd.pid
LogFile=$home/slurmdbd.log
CONF
  chmod 600 /etc/slurm/slurmdbd.conf
  cat > /etc/slurm/slurm.conf <<CONF
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/%n.pid
SlurmdSpoolDir=$home/%n
StateSaveLocation=$home/state
SlurmctldLogFile=$home/slurmctld.log
SlurmdLogFile=$home/%n.log
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
MpiDefault=none
KillWait=60
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=17001 CPUs=2 RealMemory=8000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=17002 CPUs=2 RealMemory=8000
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10
CONF
  mysql_install_db --datadir="$home/db" --user=root --auth-root-authentication-method=normal >"$home/db.log" 2>&1
  mariadbd --user=root --datadir="$home/db" --socket=/run/mysqld/mysqld.sock --skip-networking \
    --pid-file="$home/mariadbd.pid" --innodb-buffer-pool-size=64M >>"$home/db.log" 2>&1 &
  for _ in $(seq 60); do mysqladmin ping >/dev/null 2>&1 && break; sleep 0.5; done
  munge -n >/dev/null 2>&1 || su -s /bin/sh munge -c /usr/sbin/munged
  slurmdbd
  for _ in $(seq 60); do sacctmgr -i add cluster loopback >/dev/null 2>&1 && break; sleep 0.5; done
  slurmctld  # after its database knows the cluster
  slurmd -N n1
  slurmd -N n2
  for _ in $(seq 60); do [ "$(sinfo -h -p debug -o %T 2>/dev/null)" = idle ] && break; sleep 0.5; done
  sinfo
  ;;
stop) stop ;;
*) echo "cluster.sh install | start | stop" >&2; exit 2 ;;
esac
