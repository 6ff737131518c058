/*-------------------------------------------------------------------------
 *
 * shmem.c
 *	  What processes know of each other: databases and worker slots.
 *
 * A slot is taken under the lock by a supervisor (for an executor that it is
 * about to register) or by a foreground session, and freed by its process at
 * exit, or by the supervisor if the process never came.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/shmem.h"
#include "utils/timestamp.h"

#include "base/crumbs.h"
#include "base/guc.h"
#include "base/shmem.h"

RedriveShared *redrive_shared = NULL;

/* The slot of this process, freed when it exits. */
static RedriveSlot *own_slot = NULL;

static shmem_request_hook_type previous_shmem_request_hook = NULL;
static shmem_startup_hook_type previous_shmem_startup_hook = NULL;

static Size
shared_size(void)
{
	return add_size(offsetof(RedriveShared, databases),
					mul_size(sizeof(RedriveDatabase), redrive_max_databases));
}

static void
request_shmem(void)
{
	if (previous_shmem_request_hook)
		previous_shmem_request_hook();
	RequestAddinShmemSpace(shared_size());
	RequestNamedLWLockTranche("pg_redrive", 1);
}

static void
startup_shmem(void)
{
	bool		found;

	if (previous_shmem_startup_hook)
		previous_shmem_startup_hook();
	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	redrive_shared = ShmemInitStruct("pg_redrive", shared_size(), &found);
	if (!found)
	{
		memset(redrive_shared, 0, shared_size());
		redrive_shared->lock = &(GetNamedLWLockTranche("pg_redrive"))->lock;
		ConditionVariableInit(&redrive_shared->batch_ended);
		for (int i = 0; i < REDRIVE_CLAIMER_GROUPS; i++)
		{
			ConditionVariableInit(&redrive_shared->claimers[i].sleepers);
			pg_atomic_init_u64(&redrive_shared->claimers[i].woken, 0);
		}
		redrive_judge_crumbs();
	}
	LWLockRelease(AddinShmemInitLock);
}

/* Reserve shared memory; called while preloading. */
void
redrive_install_shmem_hooks(void)
{
	previous_shmem_request_hook = shmem_request_hook;
	shmem_request_hook = request_shmem;
	previous_shmem_startup_hook = shmem_startup_hook;
	shmem_startup_hook = startup_shmem;
}

static void
release(RedriveSlot *slot)
{
	redrive_detach_crumb(slot - redrive_shared->slots);
	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	slot->state = SLOT_FREE;
	slot->pid = 0;
	slot->latch = NULL;
	LWLockRelease(redrive_shared->lock);
}

/* Free the slot of a process that exits. */
static void
free_at_exit(int code, Datum arg)
{
	if (own_slot != NULL)
		release(own_slot);
	own_slot = NULL;
}

/*
 * Take a slot: STARTING for an executor, within max_workers; attached to this
 * process for a foreground session.
 *
 * Returns NULL when there is none to be had.
 */
RedriveSlot *
redrive_slot_take(Oid database, Oid owner, bool foreground)
{
	RedriveSlot *slot = NULL;

	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	if (foreground || redrive_count_executors() < redrive_max_workers)
	{
		for (int i = 0; i < REDRIVE_MAX_SLOTS && slot == NULL; i++)
			if (redrive_shared->slots[i].state == SLOT_FREE)
				slot = &redrive_shared->slots[i];
	}
	if (slot != NULL)
	{
		uint32		generation = slot->generation + 1;

		memset(slot, 0, sizeof(RedriveSlot));
		slot->generation = generation;
		slot->state = SLOT_STARTING;
		slot->foreground = foreground;
		slot->database = database;
		slot->owner = owner;
		slot->started_at = GetCurrentTimestamp();
	}
	LWLockRelease(redrive_shared->lock);
	if (slot != NULL && foreground)
		redrive_slot_attach(slot);
	return slot;
}

/* Make a STARTING slot this process's own, until it exits or frees it. */
void
redrive_slot_attach(RedriveSlot *slot)
{
	static bool registered = false;

	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	slot->pid = MyProcPid;
	slot->latch = MyLatch;
	slot->state = SLOT_CLAIMING;
	LWLockRelease(redrive_shared->lock);
	own_slot = slot;
	redrive_attach_crumb(slot - redrive_shared->slots, slot->database);
	if (!registered)
		before_shmem_exit(free_at_exit, (Datum) 0);
	registered = true;
}

/* Free a slot of this process, or one whose process never came. */
void
redrive_slot_free(RedriveSlot *slot)
{
	if (slot == own_slot)
		own_slot = NULL;
	release(slot);
}

/* Count the executors of the cluster, coming ones included.  Needs the lock. */
int
redrive_count_executors(void)
{
	int			count = 0;

	for (int i = 0; i < REDRIVE_MAX_SLOTS; i++)
		if (redrive_shared->slots[i].state != SLOT_FREE && !redrive_shared->slots[i].foreground)
			count++;
	return count;
}

/* Return the entry of a database, or NULL.  Needs the lock. */
RedriveDatabase *
redrive_find_database(Oid database)
{
	for (int i = 0; i < redrive_max_databases; i++)
		if (redrive_shared->databases[i].database == database)
			return &redrive_shared->databases[i];
	return NULL;
}

/*
 * Return the entry of a database; a new one, if need be.
 *
 * make_room: in place of a database that has neither the extension nor a
 * process of ours, if no entry is free.  Returns NULL when there is no room.
 * Needs the lock, exclusive.
 */
RedriveDatabase *
redrive_enter_database(Oid database, bool make_room)
{
	RedriveDatabase *entry = redrive_find_database(database);

	if (entry != NULL)
		return entry;
	entry = redrive_find_database(InvalidOid);
	for (int i = 0; entry == NULL && make_room && i < redrive_max_databases; i++)
	{
		RedriveDatabase *other = &redrive_shared->databases[i];

		if (other->pid == 0 && other->pusher_pid == 0 && !other->present && !other->probe)
			entry = other;
	}
	if (entry == NULL)
		return NULL;
	memset(entry, 0, sizeof(RedriveDatabase));
	entry->database = database;
	return entry;
}
